"""Which values are for a prompt, and for which of its images.

Exports carry this file as it is: it needs the standard library alone.
"""

import functools
import hashlib
import json
from typing import NamedTuple

BLOCK = 20  # consecutive images of a prompt, among which a share is exact


class Dose(NamedTuple):
    """A value that is applied to an image."""

    value: str  # the statement that the value encoder reads
    strength: float = 1.0  # 0 is the base model, 1 LiVO; between and past it the effect is scaled
    reason: str = ""  # why it was chosen, where a retriever chose it


def choose(
    prompt: str, values: tuple[str, ...], strength=1.0, keep_probability: float | None = None, retriever=None
) -> list[tuple[Dose, float]]:
    """The values of a prompt's images, each with the share of the images that it is for: [(Dose, share), ...].

    Args:
        values: statements; or ("auto",) for those that the retriever finds, biases for their keep_probability's share.
        strength: of all, or a dict of statement -> strength, 1 where it has none; 0 is no value.
        keep_probability: the share, for all; None for 1 of named values.
        retriever: a Retriever, for "auto".

    Raises:
        ValueError: keep_probability is no share.
    """
    if keep_probability is not None and not 0 <= keep_probability <= 1:
        raise ValueError(f"keep_probability={keep_probability} is not 0 to 1")
    if values == ("auto",):
        rows = [(value.statement, value.keep_probability, value.reason) for value in retriever(prompt)]
    else:
        rows = [(statement, 1.0, "") for statement in values]
    doses = []
    for statement, share, reason in rows:
        own = float(strength.get(statement, 1.0) if isinstance(strength, dict) else strength)
        if own:
            doses.append((Dose(statement, own, reason), share if keep_probability is None else keep_probability))
    return doses


def applied(doses: list[tuple[Dose, float]], seed: int, prompt: str, index: int) -> tuple[Dose, ...]:
    """Those of `choose`'s doses that the image (seed, prompt, index) gets by their shares."""
    return tuple(dose for dose, share in doses if applies(dose.value, share, seed, prompt, index))


def uniforms(n: int, *key) -> list[float]:
    """n numbers in [0, 1) that depend on the key alone: the same in every process and on every machine.

    By a cryptographic hash, so that keys that are alike give numbers that are not.

    Args:
        key: texts and whole numbers.
    """
    digest = hashlib.shake_256(json.dumps(key).encode()).digest(8 * n)
    return [(int.from_bytes(digest[i : i + 8], "big") >> 11) / 2**53 for i in range(0, 8 * n, 8)]


@functools.lru_cache(2**12)
def _block(seed: int, statement: str, prompt: str, block: int) -> tuple[list[int], float]:
    """The images of a block in the order in which they get the value, and what decides how a share is rounded."""
    *draws, rounding = uniforms(BLOCK + 1, seed, statement, prompt, block)
    return sorted(range(BLOCK), key=draws.__getitem__), rounding


def applies(statement: str, share: float, seed: int, prompt: str, index: int) -> bool:
    """Whether a value is applied to the image (seed, prompt, index).

    Of every 20 consecutive images of a prompt, from the first, exactly the share gets it: coins would add their own
    unevenness to what D1 measures. A share between two twentieths is now the one and now the other. Which images
    these are is a random permutation, so that two values go together neither more nor less than by chance.

    Args:
        statement: of the value. share: of the images, 0 to 1. index: of the image among the prompt's, from 0.
    """
    block, place = divmod(index, BLOCK)
    order, rounding = _block(seed, statement, prompt, block)
    count = int(round(share * BLOCK, 9) + rounding)  # a product may miss its whole number by the last bit
    return place in order[:count]
