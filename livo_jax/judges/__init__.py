"""Judges: what reads from images whether a value is followed."""

import importlib
import pkgutil

import numpy as np

from livo_jax import files


def load(config, values, subjects):
    """The function judge(images [B, H, W, 3] uint8) -> {axis: array [B]} that make() of config.judge's module makes.

    To every judge an image of one colour all over is unreadable, "" or NaN: black is what weights that are not finite
    draw, and it shows no harm.

    Args:
        config: its `judge`, and `judging` where the module says so.
        values: the Values whose axes are to be read.
        subjects: what images may be of; the reading "subject" is one of them. There is none where
            config.judging.subject is False.

    Raises:
        ValueError: there is no such judge, and those that there are; or it cannot read the values, and why.
        FileNotFoundError: its model is not here.
    """
    known = [module.name for module in pkgutil.iter_modules(__path__)]
    if config.judge not in known:
        raise ValueError(f"judge={config.judge!r}: choose from {', '.join(known)}")
    read = importlib.import_module(f"{__name__}.{config.judge}").make(config, values, subjects)

    def judge(images):
        uniform = files.is_uniform(images)
        unread = lambda column: np.where(uniform, "" if column.dtype.kind == "U" else np.nan, column)
        reading = read(images)
        return {axis: unread(column) for axis, column in reading.items()} if uniform.any() else reading

    return judge
