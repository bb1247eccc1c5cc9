"""LiVO on Stable Diffusion XL base 1.0 at 1024 px: configs/livo.py's recipe, with what a larger model needs.

    python run.py --config=configs/sdxl.py --config.data.directory=DIR

Fine-tunes of it go by --config.model. The value token is made by value encoders of both text encoders.
`configs/sdxl.py:smoke` runs two steps of it anywhere, without a download: on pairs of the embedded world and an XL of
benchmarks/sdxl_small, as small, with random weights.
"""

import pathlib

from livo_jax.configs import common, livo
from ml_collections import ConfigDict

SMALL = pathlib.Path(__file__).resolve().parents[1] / "benchmarks" / "sdxl_small"


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("sdxl", variant)
    config = livo.get_config(variant)
    config.data.cache = True  # encoding 1024 px at every step would cost as much again
    config.train.remat = "full"  # a block's intermediate results are recomputed: at 1024 px they are what fills memory
    config.sampling.sampler = "euler"  # as published
    if variant == "smoke":
        config.preferences.model, config.model = config.model, str(SMALL)  # the pairs' model is trained, SMALL is not
    else:
        config.model = "stabilityai/stable-diffusion-xl-base-1.0"
        config.sampling.guidance_scale = 5.0  # as published
        config.sampling.batch_size = 2  # at 1024 px images fill memory
    return config
