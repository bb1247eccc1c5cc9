"""LiVO: text-to-image models that follow human values, in JAX.

    from livo_jax import StableDiffusion, ValueEncoder, losses

livo_jax.generate, evaluate and train hold the functions that work on them.
"""

import importlib

_HOMES = {"StableDiffusion": "livo_jax.pretrained", "ValueEncoder": "livo_jax.value_encoders"}
__all__ = ["StableDiffusion", "ValueEncoder", "losses"]


def __getattr__(name: str):
    # Lazily, so that the mathematics imports with jax alone.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "losses":
        return importlib.import_module("livo_jax.losses")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
