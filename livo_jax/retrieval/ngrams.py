"""Values by a linear classifier of a prompt's words and letters, which data_tools/fit_retriever.py fits.

A prompt has n pieces: its words, its pairs of words, and its runs of 3 to 5 letters. Each falls into one of 2^BITS
buckets by a hash (Weinberger et al. 2009), so that there is no vocabulary. Its features are how many are in each
bucket, over sqrt(n). A file holds a quarter of a megabyte for each value.
"""

import os
import pathlib
import re
import zlib

import numpy as np

from livo_jax.retrieval.linear import Fitted, LinearClassifier, load
from livo_jax.values.rules import fold

SHIPPED = pathlib.Path(__file__).with_name("ngrams.safetensors")
FORMAT = "livo_jax n-grams 1"
COMMAND = "python -m data_tools.fit_retriever"
BITS = 17
LETTERS = (3, 4, 5)
PRIME, SPREAD = np.uint32(16777619), np.uint32(2654435761)  # of the FNV hash, and Knuth's multiplicative one
WORD = re.compile(r"[^\W_]+")


def buckets(prompt: str) -> np.ndarray:
    """Where the pieces of a prompt fall: [n] uint32 below 2^BITS; [0] for a prompt without words."""
    words = WORD.findall(fold(prompt))
    if not words:
        return np.zeros(0, np.uint32)
    letters = np.frombuffer(f" {' '.join(words)} ".encode(), np.uint8).astype(np.uint32)
    hashed = np.array([zlib.crc32(word.encode()) for word in words], np.uint32)
    pieces = [hashed, hashed[:-1] * PRIME + hashed[1:]]
    run = letters
    for length in range(2, max(LETTERS) + 1):  # each run is the shorter one and a letter more
        run = run[:-1] * PRIME + letters[length - 1 :]
        if length in LETTERS:
            pieces.append(run + np.uint32(length))
    return np.concatenate(pieces) * SPREAD >> np.uint32(32 - BITS)


def read(path: str | os.PathLike) -> Fitted:
    """The classifier of a file. Errors as `linear.load`; ValueError where its buckets are not 2^BITS."""
    fitted = load(path, FORMAT, COMMAND)
    if len(fitted.weights) != 2**BITS:
        raise ValueError(f"{path} is damaged: it has weights of {len(fitted.weights)} buckets, not of {2**BITS}")
    return fitted


class NGrams(LinearClassifier):
    """The classifier of a file.

    Args:
        values: those to look for. path: of the file; the one that the package brings, if none.

    Raises:
        ValueError: the file is damaged, or fitted for other values. FileNotFoundError: there is none.
    """

    REASON = "its words and letters are as in such prompts"

    def __init__(self, values, path: str | os.PathLike = ""):
        path = path or SHIPPED
        super().__init__(values, path, read(path))

    def products(self, prompt):
        pieces = buckets(prompt)
        return self.weights[pieces].sum(0) / np.sqrt(max(len(pieces), 1))
