"""LiVO: text-to-image models that follow human values, in JAX.

    from livo_jax import StableDiffusion, ValueEncoder, losses

A folder is a room, and uses only those before it in this list: models, diffusion, seeds, sharding, training, processes,
files, values, value_encoders, retrieval, sampling, judges, data, methods, evaluation, runs, export, demo, modes.
"""

import importlib
import sys

from livo_jax.moved import MOVED, Elsewhere

sys.meta_path.append(Elsewhere())

_HOMES = {
    "StableDiffusion": "livo_jax.sampling.stable_diffusion",
    "ValueEncoder": "livo_jax.value_encoders.full",
}
__all__ = ["StableDiffusion", "ValueEncoder", "losses"]


def __getattr__(name: str):
    # Lazily, so that the mathematics imports with jax alone.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "losses":
        return importlib.import_module("livo_jax.training.losses")
    if name in MOVED:
        importlib.import_module(f"livo_jax.{name}")  # says where it is
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
