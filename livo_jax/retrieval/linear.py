"""What the fitted backends share: a linear classifier of some features of a prompt, and its file.

data_tools/fit_retriever.py fits them. The probability that a prompt is for a value is
sigmoid(bias + features @ weights).
"""

import abc
import hashlib
import json
import os
import pathlib
from typing import NamedTuple

import numpy as np

from livo_jax.files.repositories import read_safetensors, write_safetensors

NUMBERS = ("weights", "bias", "thresholds")
ASKED = "a photo of a person"  # by its features a model, and its value tokens, are told from others
LIKE = 0.1  # how far, relatively, a model's features may be from those that a file was fitted with: rounding is less


class Fitted(NamedTuple):
    """What a file holds of V values, whose features are D.

    names: of the values. weights: [D, V] float16 or float32. bias: [V] float32. thresholds: [V] float32, the
    probabilities from which on a value is found. card: what it was fitted on, and its figures. known: features of a
    text, by name, by which the model is told that it was fitted with; {} where it needs no model.
    """

    names: tuple[str, ...]
    weights: np.ndarray
    bias: np.ndarray
    thresholds: np.ndarray
    card: dict
    known: dict[str, np.ndarray]


def digest(arrays: dict[str, np.ndarray], names: str) -> str:
    """A hash of a classifier's numbers, and of the JSON of its values' names: by their order they are told apart."""
    ordered = [*NUMBERS, *sorted(arrays.keys() - set(NUMBERS))]
    return hashlib.sha256(b"".join([*(arrays[name].tobytes() for name in ordered), names.encode()])).hexdigest()


def save(path: str | os.PathLike, kind: str, fitted: Fitted):
    """Writes a classifier whose features are of this kind, with its card as JSON beside the numbers."""
    arrays = {
        "weights": np.ascontiguousarray(fitted.weights),
        "bias": np.asarray(fitted.bias, np.float32),
        "thresholds": np.asarray(fitted.thresholds, np.float32),
        **{name: np.asarray(array, np.float32) for name, array in fitted.known.items()},
    }
    names = json.dumps(list(fitted.names))
    about = {"format": kind, "values": names, "sha256": digest(arrays, names), "card": json.dumps(fitted.card)}
    write_safetensors(arrays, path, about)


def load(path: str | os.PathLike, kind: str, command: str, known: tuple[str, ...] = ()) -> Fitted:
    """What `save` wrote.

    Args:
        command: what makes such a file, for errors. known: the names of the features of models that it holds.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is no classifier of this kind, or a damaged one.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; {command} makes one")
    try:
        about, arrays = read_safetensors(path)
    except ValueError as error:
        raise ValueError(f"{error}; {command} makes it anew") from error
    if about.get("format") != kind or arrays.keys() != {*NUMBERS, *known}:
        raise ValueError(f"{path} is no classifier of {kind!r}: {command} makes one")
    try:
        names, card = json.loads(about["values"]), json.loads(about["card"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged: its metadata: {error}; {command} makes it anew") from error
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names) and isinstance(card, dict)):
        raise ValueError(f"{path} is damaged: its metadata: values={names!r:.200}; {command} makes it anew")
    V = len(names)
    shapes = {name: arrays[name].shape for name in NUMBERS}
    if len(shapes["weights"]) != 2 or shapes != {
        "weights": (len(arrays["weights"]), V),
        "bias": (V,),
        "thresholds": (V,),
    }:
        raise ValueError(f"{path} is damaged: {shapes} for {V} values, {', '.join(names)}")
    if digest(arrays, about["values"]) != about.get("sha256"):
        raise ValueError(
            f"{path} is damaged, or of an earlier livo_jax: its numbers and names are not those that were written;"
            f" {command} makes it anew"
        )
    if not all(array.dtype.kind == "f" and np.isfinite(array).all() for array in arrays.values()):
        raise ValueError(f"{path} is damaged: its numbers are not finite; {command} makes it anew")
    numbers = [arrays.pop(name) for name in NUMBERS]
    return Fitted(tuple(names), *numbers, card, arrays)


def check_known(path, fitted: Fitted, found: dict[str, np.ndarray]):
    """Raises ValueError where a model's features are not those that a file was fitted with."""
    for name, array in fitted.known.items():
        there, here = array.astype(np.float64), np.asarray(found[name], np.float64)
        if there.shape == here.shape and np.linalg.norm(here - there) <= LIKE * np.linalg.norm(there):
            continue
        raise ValueError(
            f"{path} was fitted for another model, {fitted.card.get('model', '')!r}: its {name.replace('_', ' ')} are"
            " not this one's. Fit one for this model (python -m data_tools.fit_retriever), or leave it out"
        )


class LinearClassifier(abc.ABC):
    """A classifier of a file, for some of its values.

    REASON: what it says of a value that it finds.

    Raises:
        ValueError: the file is fitted for other values.
    """

    REASON: str

    def __init__(self, values, path, fitted: Fitted):
        if unknown := [value.name for value in values if value.name not in fitted.names]:
            raise ValueError(
                f"{path} is fitted for {', '.join(fitted.names)}, not for {', '.join(unknown)}: fit one for these"
                " (python -m data_tools.fit_retriever), or leave it out for them"
            )
        columns = [fitted.names.index(value.name) for value in values]
        self.card, self.names = fitted.card, [value.name for value in values]
        self.weights, self.bias = fitted.weights[:, columns].astype(np.float32), fitted.bias[columns]
        self.thresholds = dict(zip(self.names, fitted.thresholds[columns].tolist()))

    @abc.abstractmethod
    def products(self, prompt: str) -> np.ndarray:
        """The features times the weights, [V]."""

    def scores(self, prompt: str) -> dict[str, float]:
        """How probable each value is: found is it from its threshold on."""
        z = self.bias + self.products(prompt)
        return dict(zip(self.names, (1 / (1 + np.exp(-z))).tolist()))

    def __call__(self, prompt: str) -> dict[str, tuple[float, str]]:
        return {
            name: (score, f"{self.REASON} ({score:.2f}, from {self.thresholds[name]:.2f})")
            for name, score in self.scores(prompt).items()
            if score >= self.thresholds[name]
        }
