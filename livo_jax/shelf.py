"""The place from which Shelf was imported before livo_jax had rooms."""

from livo_jax.value_encoders.shelf import Shelf

__all__ = ["Shelf"]
