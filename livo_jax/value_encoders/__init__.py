"""Value encoders: full, lora and soft tokens; the shelf keeps many of them."""

from livo_jax.value_encoders.full import ValueEncoder, ValueEncoders
from livo_jax.value_encoders.kinds import KINDS, copy_of, make, start
from livo_jax.value_encoders.lora import LoRA
from livo_jax.value_encoders.soft_tokens import SoftTokens

__all__ = ["KINDS", "LoRA", "SoftTokens", "ValueEncoder", "ValueEncoders", "copy_of", "make", "start"]
