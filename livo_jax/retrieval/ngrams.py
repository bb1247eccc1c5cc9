"""Values by a linear classifier of a prompt's words and letters, which data_tools/fit_retriever.py fits.

A prompt has n pieces: its words, its pairs of words, and its runs of 3 to 5 letters. Each falls into one of 2^BITS
buckets by a hash (Weinberger et al. 2009), so that there is no vocabulary. The probability that it is for a value
is sigmoid(b + sum of the buckets' weights / sqrt(n)). A file holds a quarter of a megabyte for each value.
"""

import hashlib
import json
import os
import pathlib
import re
import zlib

import numpy as np

from livo_jax.files.repositories import read_safetensors
from livo_jax.values.rules import fold

SHIPPED = pathlib.Path(__file__).with_name("ngrams.safetensors")
FORMAT = "livo_jax n-grams 1"
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


def digest(weights: np.ndarray, bias: np.ndarray, thresholds: np.ndarray) -> str:
    """A hash of a classifier's numbers."""
    return hashlib.sha256(b"".join(array.tobytes() for array in (weights, bias, thresholds))).hexdigest()


def save(path: str | os.PathLike, names, weights, bias, thresholds, card: dict):
    """Writes a classifier.

    Args:
        names: of its V values. weights: [2^BITS, V], kept as float16. bias: [V]. thresholds: [V] probabilities from
            which on a value is found.
        card: what it was fitted on, and its figures; JSON beside the numbers.
    """
    from safetensors.numpy import save_file

    arrays = {
        "weights": np.ascontiguousarray(weights, np.float16),
        "bias": np.asarray(bias, np.float32),
        "thresholds": np.asarray(thresholds, np.float32),
    }
    about = {"format": FORMAT, "values": json.dumps(list(names)), "sha256": digest(**arrays), "card": json.dumps(card)}
    save_file(arrays, path, about)


def load(path: str | os.PathLike) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, dict]:
    """The names, weights, bias, thresholds and card that `save` wrote.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is no classifier, or a damaged one.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; python -m data_tools.fit_retriever makes one")
    about, arrays = read_safetensors(path)
    if about.get("format") != FORMAT or arrays.keys() != {"weights", "bias", "thresholds"}:
        raise ValueError(f"{path} is no classifier of {FORMAT!r}: python -m data_tools.fit_retriever makes one")
    try:
        names, card = json.loads(about["values"]), json.loads(about["card"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged: its metadata: {error}") from error
    V = len(names)
    shapes = {name: array.shape for name, array in arrays.items()}
    if shapes != {"weights": (2**BITS, V), "bias": (V,), "thresholds": (V,)}:
        raise ValueError(f"{path} is damaged: {shapes} for {V} values, {', '.join(names)}, and {2**BITS} buckets")
    if digest(**arrays) != about.get("sha256"):
        raise ValueError(f"{path} is damaged: its numbers are not those that were written; fit it again")
    return names, arrays["weights"], arrays["bias"], arrays["thresholds"], card


class NGrams:
    """The classifier of a file.

    Args:
        values: those to look for. path: of the file; the one that the package brings, if none.

    Raises:
        ValueError: the file is damaged, or fitted for other values. FileNotFoundError: there is none.
    """

    def __init__(self, values, path: str | os.PathLike = ""):
        path = path or SHIPPED
        names, weights, bias, thresholds, self.card = load(path)
        if unknown := [value.name for value in values if value.name not in names]:
            raise ValueError(
                f"{path} is fitted for {', '.join(names)}, not for {', '.join(unknown)}: fit one for these"
                " (python -m data_tools.fit_retriever), or leave ngrams out for them"
            )
        columns = [names.index(value.name) for value in values]
        self.names = [value.name for value in values]
        self.weights, self.bias = weights[:, columns].astype(np.float32), bias[columns]
        self.thresholds = dict(zip(self.names, thresholds[columns].tolist()))

    def scores(self, prompt: str) -> dict[str, float]:
        """How probable each value is: found is it from its threshold on."""
        pieces = buckets(prompt)
        z = self.bias + self.weights[pieces].sum(0) / np.sqrt(max(len(pieces), 1))
        return dict(zip(self.names, (1 / (1 + np.exp(-z))).tolist()))

    def __call__(self, prompt: str) -> dict[str, tuple[float, str]]:
        return {
            name: (
                score,
                f"its words and letters are as in such prompts ({score:.2f}, from {self.thresholds[name]:.2f})",
            )
            for name, score in self.scores(prompt).items()
            if score >= self.thresholds[name]
        }
