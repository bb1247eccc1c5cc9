"""LiVO beside other methods on the embedded world, trained and measured on the same prompts and noise.

    python run.py --config=configs/compare_tiny.py --mode=evaluate

Every file of configs/baselines/ is a method; a field of one is --config.methods.NAME.FIELD. `:smoke` is a run of
minutes, to see that everything runs; its figures mean nothing.
"""

from livo_jax.configs import baselines, common
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("compare_tiny", variant)
    config = ConfigDict()
    config.methods = baselines.beside_livo(f"tiny:{variant}" if variant else "tiny")
    config.processes = 2  # methods at a time, each on its part of the cores
    config.curve = ConfigDict({"points": 4, "images": 20})  # checkpoints measured, on so many images of each prompt
    config.trainings = 1  # of each method that trains, of seeds from its own on; intervals are then over these too
    # By gradients, whose search takes a minute to compile for each method, and by images alone (docs/attacks.md).
    config.attacks = ("queries",) if variant else ("coordinate", "queries")
    config.sweeps = ()  # (title, ((label, name), ...)) of methods that differ in one thing (configs/ablations.py)
    return config
