"""Times a training step, beside the same in PyTorch and in the last published Flax modules.

    python -m benchmarks.train_step --config=configs/tiny.py
    python -m benchmarks.train_step --config=configs/livo.py --config.model=benchmarks/sd15 --config.random_weights=True

On a CPU the second wants --config.dtype=float32 --config.train.batch_size=1 --image_size=256.

Loss and gradient norm of all are compared first, on the same noise. Then each is timed on fresh random batches.
"""

import json
import pathlib
import subprocess
import tempfile
import time

from absl import app, flags, logging
from livo_jax.benchmarks import common  # sets what jax reads when it is imported
from ml_collections import config_flags

from livo_jax import commands

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from livo_jax import seeds, sharding, value_encoders
from livo_jax.models.weights import name_of, split
from livo_jax.sampling.stable_diffusion import StableDiffusion
from livo_jax.training.batch import Batch, Noise, draw_noise
from livo_jax.training.objective import make_loss, split_models
from livo_jax.training.optimizer import learning_rate, make_optimizer
from livo_jax.training.step import jit_step, make_train_step, state_on

CONFIG = config_flags.DEFINE_config_file("config", None, "The config whose step is timed.")
PEERS = flags.DEFINE_list("peers", ["eager", "compile"], "Of eager, compile (PyTorch) and flax; empty for none.")
FLAX_PYTHON = flags.DEFINE_string("flax_python", "python", "The python that has benchmarks/flax_peer.txt.")
IMAGE_SIZE = flags.DEFINE_integer("image_size", None, "In pixels. Default: the model's.")


def random_pairs(rng, sd, config) -> tuple[Batch, Noise]:
    """Random images and texts for a step, and what it draws, numpy arrays."""
    rows, text = config.train.batch_size, sd.text_encoder.config

    def ids():
        ids = rng.integers(0, text.vocab_size - 2, (rows, text.max_position_embeddings), dtype=np.int32)
        ids[:, -1] = text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id
        return ids

    def image():
        return rng.uniform(-1, 1, (rows, sd.image_size, sd.image_size, 3)).astype(np.float32)

    batch = Batch(prompt_ids=ids(), value_prompt_ids=ids(), aligned=image(), violating=image())
    noise = draw_noise(jax.random.key(rng.integers(2**31)), (rows, *sd.latent_shape), config.loss.timesteps)
    return batch, jax.tree.map(np.asarray, noise)


def as_cached(batch: Batch, sd) -> Batch:
    """A batch as a cache has it: moments in place of images, states in place of prompts."""
    encode = jax.jit(lambda vae, images: jnp.concatenate(vae.encode(images), axis=-1))
    return Batch(
        batch.value_prompt_ids,
        prompt_states=np.float32(sd.text_encoder(batch.prompt_ids).last_hidden_state),
        aligned_moments=np.float32(encode(sd.vae, batch.aligned)),
        violating_moments=np.float32(encode(sd.vae, batch.violating)),
    )


class Ours:
    """step((batch, noise)) -> (loss, gradient norm) by livo_jax.training.step, compiled, which draws its own noise.

    `row` tells what compilation knows.
    """

    def __init__(self, sd, config, batch: Batch):
        untrained = nnx.eval_shape(lambda: value_encoders.make(config, sd))
        networks, _, frozen = split_models(sd, untrained, with_vae=batch.aligned is not None)
        params = frozen["text_encoder"]
        params = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)  # a step uses its state up
        self.mesh, tx = sharding.make_mesh(**config.mesh), make_optimizer(config)
        self.frozen = frozen = jax.device_put(frozen, sharding.replicated(self.mesh))
        self.state = state_on(self.mesh, params, tx, config)
        step = make_train_step(networks, tx, config, make_loss(networks, config))
        started = time.perf_counter()
        lowered = jit_step(step, self.state, frozen, self.mesh).lower(
            self.state, frozen, sharding.global_batch(self.mesh, batch)
        )
        lowering = time.perf_counter() - started
        self.step = lowered.compile()
        compilation = time.perf_counter() - started - lowering
        self.row = {"lower_s": lowering, "compile_s": compilation, "tflop": lowered.cost_analysis()["flops"] / 1e12}
        if memory := self.step.memory_analysis():
            self.row["temporary_gib"] = memory.temp_size_in_bytes / 2**30

    def __call__(self, given: tuple[Batch, Noise]) -> tuple[float, float]:
        self.state, metrics = self.step(self.state, self.frozen, sharding.global_batch(self.mesh, given[0]))
        return float(metrics["loss"]), float(metrics["grad_norm"])


def flax_peer(sd, config, batch: Batch, noise: Noise) -> dict:
    """What benchmarks/flax_peer.py, in a process of its own, finds of its step on a cached batch."""
    columns = {name: x for name, x in batch._asdict().items() if x is not None}
    columns |= {f"noise_{name}": x for name, x in noise._asdict().items()}
    with tempfile.TemporaryDirectory() as directory:
        directory = pathlib.Path(directory)
        for part in ("unet", "text_encoder"):
            leaves = jax.tree_util.tree_leaves_with_path(split(getattr(sd, part))[1])
            named = {name_of(path): leaf for path, leaf in leaves}
            np.savez(directory / f"{part}.npz", **{name: np.float32(leaf) for name, leaf in named.items()})
        np.savez(directory / "batch.npz", **columns)
        settings = {"root": str(sd.root.resolve()), "scale": sd.vae.config.scaling_factor}
        settings |= {"repeats": common.REPEATS.value, "config": json.loads(config.to_json_best_effort())}
        (directory / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        command = [FLAX_PYTHON.value, "-m", "livo_jax.benchmarks.flax_peer", str(directory)]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def main(_):
    logging.set_verbosity(logging.WARNING)
    config, rng = CONFIG.value, np.random.default_rng(0)
    config.train.learning_rate = learning_rate(config)  # for those who do not know what 0 is
    if unknown := set(PEERS.value) - {"eager", "compile", "flax"}:
        raise app.UsageError(f"--peers={','.join(PEERS.value)}: {', '.join(unknown)} is none of eager, compile, flax")
    make = StableDiffusion.from_config if config.random_weights else StableDiffusion.from_pretrained
    sd = make(config.model, jnp.dtype(config.dtype))
    sd.unet.remat = config.train.remat
    if IMAGE_SIZE.value:
        side = IMAGE_SIZE.value * sd.latent_shape[0] // sd.image_size
        sd.image_size, sd.latent_shape = IMAGE_SIZE.value, (side, side, sd.latent_shape[2])

    # The first step of a run draws this: all take the same.
    batch, noise = random_pairs(rng, sd, config)
    key = jax.random.fold_in(seeds.key(config.seed), 0)
    noise = jax.tree.map(np.asarray, draw_noise(key, noise.eps.shape, config.loss.timesteps))
    cached = as_cached(batch, sd)

    def fresh():
        return random_pairs(rng, sd, config)

    def fresh_cached():
        """New texts and noise with the moments of the first: encoding others would take longer than the steps."""
        other, noise = fresh()
        return cached._replace(value_prompt_ids=other.value_prompt_ids), noise

    rows = []

    def time_step(name: str, step, given: tuple, inputs):
        loss, norm = step(given)
        rows.append({"step": name, "loss": loss, "grad_norm": norm, "seconds": common.median_seconds(step, inputs)})
        rows[-1] |= getattr(step, "row", {})

    time_step("livo_jax, cached", Ours(sd, config, cached), (cached, noise), fresh_cached)
    time_step("livo_jax, images", Ours(sd, config, batch), (batch, noise), fresh)
    if "flax" in PEERS.value:
        rows.append({"step": "diffusers' Flax, cached", **flax_peer(sd, config, cached, noise)})
    if {"eager", "compile"} & set(PEERS.value):
        from livo_jax.benchmarks.official import TrainStep

        for mode in PEERS.value:
            if mode != "flax":
                time_step(f"PyTorch {mode}, images", TrainStep(sd, config, mode == "compile"), (batch, noise), fresh)
    for row in rows:
        row["pairs_per_sec"] = config.train.batch_size / row["seconds"]
        row["cached_is_faster"] = row["seconds"] / rows[0]["seconds"]
    settings = {"batch_size": config.train.batch_size, "image_size": sd.image_size}
    common.report("train_step", settings | {"model": config.model, "dtype": config.dtype}, rows)
    tolerance = 0.01 if config.dtype == "float32" else 0.3  # of differences of errors, which the slopes multiply
    for name in ("loss", "grad_norm"):
        if far := [row for row in rows if abs(row[name] / rows[0][name] - 1) > tolerance]:
            raise AssertionError(f"{name} is not equal: {rows[0][name]} and {', '.join(str(r[name]) for r in far)}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=commands.parse)
