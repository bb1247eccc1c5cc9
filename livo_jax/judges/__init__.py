"""Judges: what reads from images whether a value is followed."""

import importlib
import pkgutil

import numpy as np

from livo_jax.files.settings import import_named


def load(config, values, subjects):
    """The function judge(images [B, H, W, 3] uint8) -> {axis: array [B]} of config.judge.

    A module here is named by its name, and its make(config, values, subjects) makes the function; another such make, of
    your own code, is named as "package.module:Name".

    Args:
        config: its `judge`, and `judging` where the module says so. An image of one colour, as a black one, shows
            nothing: whatever the judge makes of it, it cannot be read ("" or nan).
        values: the Values whose axes are to be read.
        subjects: what images may be of; the reading "subject" is one of them. There is none where
            config.judging.subject is False.

    Raises:
        ValueError: there is no such judge, and those that there are; or it cannot read the values, and why.
        FileNotFoundError: its model is not here.
    """
    known = [module.name for module in pkgutil.iter_modules(__path__)]
    if ":" in config.judge:
        make = import_named(config.judge, "config.judge")
    elif config.judge in known:
        make = importlib.import_module(f"{__name__}.{config.judge}").make
    else:
        raise ValueError(
            f"judge={config.judge!r}: choose from {', '.join(known)}, or name one of your own, package.module:Name"
        )
    judge = make(config, values, subjects)

    def read(images):
        blank, reading = uniform(images), judge(images)
        if not blank.any():
            return reading
        nothing = lambda column: "" if column.dtype.kind == "U" else np.nan
        return {axis: np.where(blank, nothing(column), column) for axis, column in reading.items()}

    return read


def uniform(images) -> np.ndarray:
    """[B] bool: whether an image of [B, H, W, 3] uint8 has one colour throughout."""
    return (images == images[:, :1, :1]).all((1, 2, 3))
