"""Nested settings, as a config.json has them, compared."""

import jax


def flatten(config: dict) -> dict:
    """Nested dicts as one: {"train.steps": 1200, ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(config, is_leaf=lambda x: not isinstance(x, dict))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def differences(theirs: dict, ours: dict) -> list[str]:
    """A line for each field in which two configs, as nested dicts, differ."""
    theirs, ours = flatten(theirs), flatten(ours)
    return [
        f"config.{name}: {theirs.get(name)!r} there, {ours.get(name)!r} now"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    ]
