"""Seeds: every whole number from 0 to 2**63 - 1 has a stream of its own."""

import numbers

import jax
import jax.numpy as jnp

MOST = 2**63 - 1


def check(seed, name: str = "seed") -> int:
    """The seed as an int. Raises ValueError, by the name of the seed, where it is no such number."""
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= seed <= MOST:
        raise ValueError(f"{name}={seed!r}: choose a whole number from 0 to {MOST}")
    return int(seed)


def words(seed: int) -> tuple[int, int]:
    """The lower and the upper 32 bits of a seed."""
    return seed & 0xFFFFFFFF, seed >> 32


def key_of(low, high) -> jax.Array:
    """The key of a seed of these words, uint32; below 2**32 it is jax.random.key(seed), which would drop the rest."""
    key = jax.random.key(low)
    return jnp.where(high > 0, jax.random.fold_in(key, high), key)


def key(seed: int) -> jax.Array:
    """The key of a seed. Raises ValueError as check."""
    return key_of(*words(check(seed)))


def problems(config) -> list[str]:
    """What is wrong with the seeds of a config."""
    found = []
    for name, seed in ("config.seed", config.seed), ("config.eval.seed", config.eval.seed):
        try:
            check(seed, name)
        except ValueError as error:
            found.append(str(error))
    return found
