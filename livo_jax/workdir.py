"""Where a run lives: on a disk that every process sees, or in a bucket (gs://), with one config."""

import json
import os
import secrets

import jax
from etils import epath
from jax.experimental import multihost_utils

# Fields that may change between the starts of a run: no parameter depends on them, but for rounding.
FREE = (
    "checkpoint", "eval", "log", "profile", "mesh", "shard_frozen", "cpu_devices", "data.cache",
    "judging.endpoint", "judging.cache", "judging.budget",
)  # fmt: skip


def find(path: str | os.PathLike) -> epath.Path:
    """An absolute path, on disk or in a bucket. Raises ValueError for buckets that Orbax cannot write to."""
    if not is_remote(path):
        return epath.Path(path).absolute()
    if not os.fspath(path).startswith("gs://"):
        raise ValueError(f"workdir {path}: checkpoints can be written to a disk or to gs://BUCKET/... alone")
    return epath.Path(path)


def is_remote(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)


def say(text: str):
    """Prints, from process 0."""
    if jax.process_index() == 0:
        print(text)


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


def claim(workdir: epath.Path, config):
    """Writes config.json, or checks that what is in the workdir was made with the same config.

    Raises:
        ValueError: another config made the pairs or checkpoints here, and the differences; or there are
            processes that do not see the workdir.
    """
    file = workdir / "config.json"
    ours = json.loads(config.to_json())
    if file.exists() and any((workdir / made).exists() for made in ("preferences", "checkpoints")):
        both = flatten(json.loads(file.read_text())), flatten(ours)
        fixed = ({k: v for k, v in tree.items() if not k.startswith(FREE)} for tree in both)
        if found := differences(*fixed):
            raise ValueError(f"{workdir} holds a run of another config: name a new --workdir\n  " + "\n  ".join(found))
    check_shared(workdir)
    if jax.process_index() == 0:
        file.write_text(json.dumps(ours, indent=2) + "\n")


def check_shared(workdir: epath.Path):
    """Makes the workdir. Raises ValueError, in every process, where some do not see what process 0 writes there."""
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_count() == 1:
        return
    token = int(multihost_utils.broadcast_one_to_all(secrets.randbits(31)))
    sign = workdir / f".shared-{token}"
    if jax.process_index() == 0:
        sign.write_text("")
    multihost_utils.sync_global_devices("written")
    seen = multihost_utils.process_allgather(sign.exists())
    if jax.process_index() == 0:
        sign.unlink()
    if not seen.all():
        raise ValueError(
            f"{workdir} is not shared: processes {[int(i) for i in (~seen).nonzero()[0]]} do not see what process 0"
            " writes there: name a --workdir on a disk of all, or in a bucket (gs://...)"
        )


def recipe(workdir: epath.Path) -> dict | None:
    """The config.json of a run, None where none was trained."""
    file = workdir / "config.json"
    return json.loads(file.read_text()) if (workdir / "checkpoints").exists() and file.exists() else None
