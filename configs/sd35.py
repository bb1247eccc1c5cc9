"""LiVO on Stable Diffusion 3.5 medium at 1024 px: configs/livo.py's recipe on a flow, with what a larger model needs.

    python run.py --config=configs/sd35.py --config.data.directory=DIR

Large, and 3 medium, go by --config.model. The value token is made by value encoders of both CLIPs.
`configs/sd35.py:smoke` runs two steps of it anywhere, without a download: on pairs of the embedded world and a 3.5 of
benchmarks/sd35_small, as small, with random weights.
"""

import pathlib

from livo_jax.configs import livo
from ml_collections import ConfigDict

SMALL = pathlib.Path(__file__).resolve().parents[1] / "benchmarks" / "sd35_small"


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "smoke"):
        raise ValueError(f"configs/sd35.py:{variant}: there is configs/sd35.py and configs/sd35.py:smoke")
    config = livo.get_config(variant)
    config.data.cache = True  # T5 and the VAE at every step would cost more than the step
    config.loss.timestep_density = "logit_normal"  # as it was trained
    config.train.remat = "full"  # a block's intermediate results are recomputed: at 1024 px they are what fills memory
    config.sampling.sampler = "euler"  # as published
    if variant == "smoke":
        config.preferences.model, config.model = config.model, str(SMALL)  # the pairs' model is trained, SMALL is not
    else:
        config.model = "stabilityai/stable-diffusion-3.5-medium"
        config.sampling.guidance_scale, config.sampling.steps = 4.5, 40  # as published
        config.sampling.batch_size = 2  # at 1024 px images fill memory
    return config
