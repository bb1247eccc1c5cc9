"""Times the sampler, beside diffusers' pipeline in PyTorch.

    python -m benchmarks.sampler --config=configs/tiny.py
    python -m benchmarks.sampler --config=configs/livo.py --config.model=benchmarks/sd15 --config.random_weights=True

Images of the base model, config.sampling.batch_size at once, from text to pixels. Those of the same noise are compared
first; then each is timed on fresh noise. A config with guidance is timed without, too (guidance_scale=1).
"""

import itertools

from absl import app, flags, logging
from livo_jax.benchmarks import common  # sets what jax reads when it is imported
from ml_collections import config_flags

from livo_jax import commands

# isort: split
import jax.numpy as jnp
import numpy as np

from livo_jax import sharding
from livo_jax.sampling.generate import generate, initial_noise
from livo_jax.sampling.requests import Request
from livo_jax.sampling.stable_diffusion import StableDiffusion
from livo_jax.values.principles import text_hash

CONFIG = config_flags.DEFINE_config_file("config", None, "The config whose sampler is timed.")
PEERS = flags.DEFINE_list("peers", ["eager", "compile"], "Of eager and compile (PyTorch); empty for none.")
PROMPT = "a photo of a baker"
UNGUIDED = "livo_jax, no guidance"


class Pipeline:
    """images(seed): diffusers' StableDiffusionPipeline on our weights and our initial noise."""

    def __init__(self, sd, config, compiled: bool):
        import diffusers
        import torch
        from livo_jax.benchmarks import official

        dtype = getattr(torch, config.dtype)
        parts = {part: official.model(sd, part, dtype) for part in official.MODELS}
        scheduler = diffusers.DPMSolverMultistepScheduler.from_config(sd.scheduler_config)
        self.pipe = diffusers.StableDiffusionPipeline(
            **parts, tokenizer=sd.tokenizer, scheduler=scheduler, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
        self.pipe.set_progress_bar_config(disable=True)
        if compiled:
            self.pipe.unet.compile()
            self.pipe.vae.decoder.compile()
        self.sd, self.sampling, self.tensor = sd, config.sampling, lambda x: official.tensor(x).to(dtype)

    def __call__(self, seed: int) -> np.ndarray:
        c, n = self.sampling, self.sampling.batch_size
        noise = [initial_noise(seed, text_hash(PROMPT), i, self.sd.latent_shape) for i in range(n)]
        images = self.pipe(
            [PROMPT] * n, num_inference_steps=c.steps, guidance_scale=c.guidance_scale, output_type="np",
            latents=self.tensor(np.stack(noise)),
        ).images  # fmt: skip
        return np.round(images * 255).astype(np.uint8)


def main(_):
    logging.set_verbosity(logging.WARNING)
    config = CONFIG.value
    if unknown := set(PEERS.value) - {"eager", "compile"}:
        raise app.UsageError(f"--peers={','.join(PEERS.value)}: {', '.join(unknown)} is none of eager, compile")
    config.sampling.sampler = "dpmsolver++"
    make = StableDiffusion.from_config if config.random_weights else StableDiffusion.from_pretrained
    sd, n = make(config.model, jnp.dtype(config.dtype)), config.sampling.batch_size
    requests, mesh = [Request(PROMPT, i) for i in range(n)], sharding.make_mesh(**config.mesh)
    divided = config.sampling.to_dict() | {"batch_size": -(-n // sharding.batch_parts(mesh))}  # of each device
    samplers = {"livo_jax": lambda seed: generate(sd, requests, seed=seed, mesh=mesh, **divided)} | {
        f"diffusers, PyTorch {mode}": Pipeline(sd, config, mode == "compile") for mode in PEERS.value
    }
    if config.sampling.guidance_scale > 1:
        unguided = divided | {"guidance_scale": 1.0}
        samplers[UNGUIDED] = lambda seed: generate(sd, requests, seed=seed, mesh=mesh, **unguided)
    first, fresh, rows = samplers["livo_jax"](0).astype(int), itertools.count(1), []
    compared = {name: sample for name, sample in samplers.items() if name != UNGUIDED}  # whose images are others
    differences = {name: float(np.abs(sample(0) - first).mean()) for name, sample in compared.items()}
    for name, seconds in common.median_seconds_in_turns(samplers, lambda: next(fresh)).items():
        row = {"sampler": name} | ({"difference": differences[name]} if name in differences else {})
        rows.append(row | {"seconds": seconds, "images_per_sec": n / seconds})
    for row in rows:
        row["livo_jax_is_faster"] = row["seconds"] / rows[0]["seconds"]
    settings = {"model": config.model, "dtype": config.dtype, "image_size": sd.image_size, **config.sampling}
    common.report("sampler", settings, rows)
    if far := [row for row in rows if row.get("difference", 0) > (0.5 if config.dtype == "float32" else 8)]:
        raise AssertionError(f"images differ: {far}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=commands.parse)
