"""Compares training with frozen models in bfloat16, and with weights of 8 bits, with float32: same batches and noise.

    python -m benchmarks.precision --config=configs/tiny.py --config.data.directory=DIR

DIR holds pairs, as WORKDIR/preferences of a run. The trainings go side by side; and at each parameter of the first, the
predictions and the gradients of all are compared.
"""

import collections
import functools

from absl import app, flags, logging
from livo_jax.benchmarks import common  # sets what jax reads when it is imported
from ml_collections import config_flags

from livo_jax import commands

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import optax

from livo_jax import seeds
from livo_jax.data.batches import batches
from livo_jax.data.preferences import Preferences
from livo_jax.models.quantised import DTYPES
from livo_jax.sampling.stable_diffusion import StableDiffusion
from livo_jax.training.batch import draw_noise
from livo_jax.training.objective import add_noise, make_loss, prompt_states, split_models
from livo_jax.training.optimizer import make_optimizer
from livo_jax.training.step import init_state, make_train_step
from livo_jax.value_encoders.full import ValueEncoder

CONFIG = config_flags.DEFINE_config_file("config", None, "The config that is trained.")
STEPS = flags.DEFINE_integer("steps", 100, "Of training.", lower_bound=1)
LESS = ("bfloat16", "int8", "fp8")  # 8 bits of float32 weights, computed in float32


def relative(a, b) -> float:
    """The relative deviation of a tree from another, by their norms."""
    return float(optax.tree.norm(optax.tree.sub(a, b)) / optax.tree.norm(b))


def load(name: str, config) -> StableDiffusion:
    sd = StableDiffusion.from_pretrained(config.model, jnp.bfloat16 if name == "bfloat16" else jnp.float32)
    if name in DTYPES:
        sd.quantise(name)
    return sd


def main(_):
    logging.set_verbosity(logging.WARNING)
    config = CONFIG.value
    models = {name: load(name, config) for name in ("float32", *LESS)}
    sd, tx = models["float32"], make_optimizer(config)
    value_encoder = ValueEncoder.from_pretrained(config.model, subfolder="text_encoder")
    state, frozen, step, gradient, predict = {}, {}, {}, {}, {}
    for name, model in models.items():
        networks, params, frozen[name] = split_models(model, value_encoder, with_vae=True)
        loss = make_loss(networks, config)
        step[name] = jax.jit(make_train_step(networks, tx, config, loss))
        gradient[name] = jax.jit(jax.value_and_grad(loss, has_aux=True))
        predict[name] = jax.jit(functools.partial(prediction, networks))
        state[name] = init_state(params, tx, config.train.ema_decay)
    iterator = batches(
        Preferences(config.data.directory), sd.tokenize, batch_size=config.train.batch_size, image_size=sd.image_size,
        random_flip=config.data.random_flip, seed=config.seed,
    )  # fmt: skip

    found = {name: collections.defaultdict(list) for name in LESS}
    shape = (config.train.batch_size, *sd.latent_shape)
    for k, batch in zip(range(STEPS.value), iterator):
        key = jax.random.fold_in(seeds.key(config.seed), k)
        noise = draw_noise(key, shape, config.loss.timesteps)
        params, apart, of = state["float32"]["params"], {}, {}
        for name in models:
            (loss, _), gradients = gradient[name](params, frozen[name], batch, noise)
            of[name] = predict[name](frozen[name], batch, noise), loss, gradients
            state[name], metrics = step[name](state[name], frozen[name], batch)
            apart[name] = metrics["loss"]
        whole = of["float32"]
        for name, rows in found.items():
            for what, ours, theirs in zip(("prediction", "loss", "gradient"), of[name], whole, strict=True):
                rows[what].append(relative(ours, theirs))
            norms = optax.tree.norm(of[name][2]) * optax.tree.norm(whole[2])
            rows["cosine"].append(float(optax.tree.vdot(of[name][2], whole[2]) / norms))
            rows["loss_trained_apart"].append(relative(apart[name], apart["float32"]))
    statistics = {"median": np.median, "mean": np.mean, "least": np.min, "most": np.max}
    rows = [
        {"weights": name, "deviation": what} | {s: float(f(values)) for s, f in statistics.items()}
        for name, of_name in found.items()
        for what, values in of_name.items()
    ]
    size = {name: sum(x.nbytes for x in jax.tree.leaves(weights)) for name, weights in frozen.items()}
    settings = {"model": config.model, "batch_size": config.train.batch_size, "steps": STEPS.value, "bytes": size}
    common.report("precision", settings, rows)


def prediction(networks, frozen, batch, noise):
    """What is denoised of a batch's images, without values."""
    z_t, t, _ = add_noise(networks, frozen, batch, noise, ("aligned",))
    c, pooled = prompt_states(networks, frozen, batch)
    return networks.apply("unet", frozen, z_t, t, c, None, pooled, networks.time_ids).astype(jnp.float32)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=commands.parse)
