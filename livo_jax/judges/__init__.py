"""Judges: what reads from images whether a value is followed."""

import importlib
import pkgutil


def load(name: str):
    """The function judge(images [B, H, W, 3] uint8) -> {axis: array [B]} of a judge's module.

    Raises:
        ValueError: there is no such judge; those that there are are listed.
    """
    known = [module.name for module in pkgutil.iter_modules(__path__)]
    if name not in known:
        raise ValueError(f"judge={name!r}: choose from {', '.join(known)}")
    return importlib.import_module(f"{__name__}.{name}").judge
