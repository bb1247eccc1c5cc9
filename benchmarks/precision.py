"""Compares training with frozen models in bfloat16 and in float32, on the same batches and noise.

    python -m benchmarks.precision --config=configs/tiny.py --config.data.directory=DIR

DIR holds pairs, as WORKDIR/preferences of a run. Two trainings go side by side; and at each parameter of the first, the
gradients of both are compared.
"""

from absl import app, flags, logging
from ml_collections import config_flags

from benchmarks import common  # sets what jax reads when it is imported
from livo_jax import commands

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import optax

from livo_jax import seeds
from livo_jax.data.batches import batches
from livo_jax.data.preferences import Preferences
from livo_jax.sampling.stable_diffusion import StableDiffusion
from livo_jax.training.batch import draw_noise
from livo_jax.training.objective import make_loss, split_models
from livo_jax.training.optimizer import make_optimizer
from livo_jax.training.step import init_state, make_train_step
from livo_jax.value_encoders.full import ValueEncoder

CONFIG = config_flags.DEFINE_config_file("config", None, "The config that is trained.")
STEPS = flags.DEFINE_integer("steps", 100, "Of training.", lower_bound=1)
DTYPES = ("float32", "bfloat16")


def relative(a, b) -> float:
    """The relative deviation of a from b."""
    return abs(float(a) / float(b) - 1)


def main(_):
    logging.set_verbosity(logging.WARNING)
    config = CONFIG.value
    models = {dtype: StableDiffusion.from_pretrained(config.model, jnp.dtype(dtype)) for dtype in DTYPES}
    sd, tx = models["float32"], make_optimizer(config)
    value_encoder = ValueEncoder.from_pretrained(config.model, subfolder="text_encoder")
    split_by_dtype = {dtype: split_models(model, value_encoder, with_vae=True) for dtype, model in models.items()}
    frozen = {dtype: frozen for dtype, (*_, frozen) in split_by_dtype.items()}
    networks, params, _ = split_by_dtype["float32"]
    loss = make_loss(networks, config)
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    step = jax.jit(make_train_step(networks, tx, config, loss))
    state = dict.fromkeys(DTYPES, init_state(params, tx, config.train.ema_decay))
    iterator = batches(
        Preferences(config.data.directory), sd.tokenize, batch_size=config.train.batch_size, image_size=sd.image_size,
        random_flip=config.data.random_flip, seed=config.seed,
    )  # fmt: skip

    found = {name: [] for name in ("loss", "grad_norm", "gradient", "cosine", "loss_trained_apart")}
    shape = (config.train.batch_size, *sd.latent_shape)
    for k, batch in zip(range(STEPS.value), iterator):
        key = jax.random.fold_in(seeds.key(config.seed), k)
        noise = draw_noise(key, shape, config.loss.timesteps)
        (whole, _), g = gradient(state["float32"]["params"], frozen["float32"], batch, noise)
        (half, _), h = gradient(state["float32"]["params"], frozen["bfloat16"], batch, noise)
        norms = optax.tree.norm(g), optax.tree.norm(h)
        found["loss"].append(relative(half, whole))
        found["grad_norm"].append(relative(norms[1], norms[0]))
        found["gradient"].append(float(optax.tree.norm(optax.tree.sub(h, g)) / norms[0]))
        found["cosine"].append(float(optax.tree.vdot(g, h) / norms[0] / norms[1]))
        metrics = {}
        for dtype in DTYPES:
            state[dtype], metrics[dtype] = step(state[dtype], frozen[dtype], batch)
        found["loss_trained_apart"].append(relative(metrics["bfloat16"]["loss"], metrics["float32"]["loss"]))
    statistics = {"median": np.median, "mean": np.mean, "least": np.min, "most": np.max}
    rows = [
        {"deviation": name} | {s: float(f(values)) for s, f in statistics.items()} for name, values in found.items()
    ]
    settings = {"model": config.model, "batch_size": config.train.batch_size, "steps": STEPS.value}
    common.report("precision", settings, rows)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=commands.parse)
