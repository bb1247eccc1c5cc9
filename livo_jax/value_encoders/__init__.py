"""Value encoders: full, lora and soft tokens; the shelf keeps many of them."""

from livo_jax.value_encoders.kinds import KINDS, copy_of, make, start

__all__ = ["KINDS", "copy_of", "make", "start"]
