"""LiVO on Stable Diffusion 3.5 medium at 1024 px: configs/sdxl.py's recipe and settings, on a flow.

    python run.py --config=configs/sd35.py --config.data.directory=DIR

Large, and 3 medium, go by --config.model. The value token is made by value encoders of both CLIPs.
`configs/sd35.py:smoke` runs two steps of it anywhere, without a download: on pairs of the embedded world and a 3.5 of
benchmarks/sd35_small, as small, with random weights.
"""

import pathlib

from livo_jax.configs import common, sdxl
from ml_collections import ConfigDict

SMALL = pathlib.Path(__file__).resolve().parents[1] / "benchmarks" / "sd35_small"


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("sd35", variant)
    config = sdxl.get_config(variant)  # the cache, recomputed blocks and a sampler, for 1024 px
    config.loss.timestep_density = "logit_normal"  # as it was trained
    if variant == "smoke":
        config.model = str(SMALL)
    else:
        config.model = "stabilityai/stable-diffusion-3.5-medium"
        config.sampling.guidance_scale, config.sampling.steps = 4.5, 40  # as published
    return config
