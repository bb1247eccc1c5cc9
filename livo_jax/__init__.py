"""LiVO: text-to-image models that follow human values, in JAX.

    from livo_jax import StableDiffusion, ValueEncoder, losses

A folder is a room, and uses only those before it in this list: models, diffusion, sharding, files, values,
value_encoders, retrieval, sampling, judges, data, training, methods, evaluation, runs, export, demo, modes.
"""

import importlib
import pathlib
import sys

from livo_jax.moved import MOVED, Moved

sys.meta_path.append(Moved())
# configs, data_tools and benchmarks lie in the package where it is installed, and beside it in a checkout.
if not (pathlib.Path(__path__[0]) / "configs").is_dir():
    __path__.append(str(pathlib.Path(__path__[0]).parent))

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
