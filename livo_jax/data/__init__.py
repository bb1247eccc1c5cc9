"""Preference pairs on disk, and batches of them."""

from livo_jax.data.batches import batches
from livo_jax.data.cache import cache_dtype, cache_made_of
from livo_jax.data.preferences import SIDES, Block, Preferences, decode
from livo_jax.data.rewording import prompts_of, reworded

__all__ = [
    "Block",
    "Preferences",
    "SIDES",
    "batches",
    "cache_dtype",
    "cache_made_of",
    "decode",
    "prompts_of",
    "reworded",
]
