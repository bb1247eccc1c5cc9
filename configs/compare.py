"""LiVO beside other methods on Stable Diffusion 1.5, trained and measured on the same prompts and noise.

    python run.py --config=configs/compare.py --mode=evaluate

Every file of configs/baselines/ is a method; a field of one is --config.methods.NAME.FIELD. All are judged by CLIP.
"""

from livo_jax.configs import baselines
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.methods = baselines.beside_livo("livo")
    for own in config.methods.values():
        own.judge, own.judging.model = "clip", "openai/clip-vit-large-patch14"
    config.processes = 1  # methods at a time: they share the devices
    config.curve = ConfigDict({"points": 5, "images": 20})  # checkpoints measured, on so many images of each prompt
    config.trainings = 1  # of each method that trains, of seeds from its own on; intervals are then over these too
    config.attacks = ()  # or ("coordinate", "queries"): docs/attacks.md; a search is thousands of steps or images
    config.sweeps = ()  # (title, ((label, name), ...)) of methods that differ in one thing (configs/ablations.py)
    return config
