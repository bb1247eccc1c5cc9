"""Nested settings, as a config.json has them: compared; and the user's own code, which a setting names."""

import importlib

import jax

from livo_jax.models.weights import name_of


def flatten(config: dict) -> dict:
    """Nested dicts as one: {"train.steps": 1200, ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(config, is_leaf=lambda x: not isinstance(x, dict))
    return {name_of(path): leaf for path, leaf in leaves}


def differences(theirs: dict, ours: dict) -> list[str]:
    """A line for each field in which two configs, as nested dicts, differ."""
    theirs, ours = flatten(theirs), flatten(ours)
    return [
        f"config.{name}: {theirs.get(name)!r} there, {ours.get(name)!r} now"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    ]


def import_named(text: str, field: str):
    """The object that "package.module:Name" names, of the user's own code.

    Args:
        field: of the config, for errors.

    Raises:
        ValueError: there is no such module on Python's path, or no such name in it. An error in the module
            itself is raised as it is.
    """
    name, _, attribute = text.partition(":")
    if not (name and attribute):
        raise ValueError(f"{field}={text!r}: name one of your own as package.module:Name")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and misses another
        raise ValueError(
            f"{field}={text!r}: Python finds no module {error.name!r}: set PYTHONPATH to its folder"
        ) from None
    if not hasattr(module, attribute):
        raise ValueError(f"{field}={text!r}: the module {name!r} has no {attribute!r}")
    return getattr(module, attribute)
