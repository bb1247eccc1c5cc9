"""Value encoders: full, lora and soft tokens; the shelf keeps many of them."""

from livo_jax.value_encoders.base import TrainableTokens, ValueTokens
from livo_jax.value_encoders.full import ValueEncoder, ValueEncoders, copy_of
from livo_jax.value_encoders.kinds import KINDS, kind_of, make, start
from livo_jax.value_encoders.lora import LoRA
from livo_jax.value_encoders.soft_tokens import SoftTokens

__all__ = [
    "KINDS",
    "LoRA",
    "SoftTokens",
    "TrainableTokens",
    "ValueEncoder",
    "ValueEncoders",
    "ValueTokens",
    "copy_of",
    "kind_of",
    "make",
    "start",
]
