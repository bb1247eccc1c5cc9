"""Where a run lives: on a disk that every process sees, or in a bucket (gs://), with one config."""

import json
import pathlib
import secrets

import jax
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from livo_jax.files.directories import is_moved, write_json
from livo_jax.files.settings import differences, flatten
from livo_jax.processes import ending_together
from livo_jax.value_encoders.gates import from_json

# Fields that may change between the starts of a run: no parameter depends on them, but for rounding.
FREE = (
    "checkpoint", "eval", "attack", "log", "profile", "mesh", "shard_frozen", "cpu_devices", "data.cache",
    "judging.endpoint", "judging.cache", "judging.budget", "judging.thresholds", "judging.colours",
    "judging.counted_from", "sampling.gated",
    "preferences.images_per_file",
)  # fmt: skip

# Files and folders: the same in another place changes nothing.
PLACES = ("model", "principles_file", "judging.model", "preferences.model", "value_encoder.start")

# What was done before there was a field for it, which is what a config.json without the field means. A new field that
# is not free needs its line here, or older runs are refused.
BEFORE = {
    "method": "livo", "variant": "", "random_weights": False, "guidance_distilled": False, "loras": [],
    "quantised": "",
    "value_encoder.kind": "full", "value_encoder.start": "", "value_encoder.rank": 8, "value_encoder.alpha": 8.0,
    "value_encoder.targets": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], "value_encoder.tokens": 4,
    "value_encoder.states": 1, "value_encoder.reads_prompt": True, "value_encoder.alone": [],
    "value_encoder.pooled": False,
    "principles_file": "", "judging.model": "", "judging.subject": True, "judging.labels": [],
    "judging.unspecified": False, "judging.classes": [], "judging.detected_from": 0.3,
    "preferences.model": "", "preferences.candidates_per_pair": 1.0, "preferences.least_distance": 0,
    "preferences.attacks": [],
    "loss.timestep_density": "uniform",
    "data.beside": 0.0, "data.attributes": 0.0, "data.anchors": 0.0,
    "loss.form": "livo", "loss.min_snr_gamma": 0.0, "loss.anchor": 0.0, "loss.anchor_of_harms": 1.0,
    "train.accumulate": 1, "train.remat": "none", "train.learning_rate_scaling": "none",
    "train.reference_batch_size": 8, "train.warmup_steps": 0, "train.train_embeddings": True, "train.ema_decay": 0.0,
    "sampling.prompt_layout": "padded",
}  # fmt: skip


def as_now(theirs: dict, ours: dict) -> dict:
    """The config of an older run, nested dicts, as flat as flatten makes it, with no other fields than `ours`.

    What it lacks is what was done before there was a field. What is gone since is told, and left out: nothing reads it.
    """
    theirs, names = flatten(theirs), flatten(ours).keys()
    if gone := sorted(theirs.keys() - names):
        told = ", ".join(f"config.{name}={theirs[name]!r}" for name in gone)
        logging.warning("the run was begun with %s: nothing reads that now", told)
    known = BEFORE | theirs
    return {name: known[name] for name in names if name in known}


def where_moved(theirs: dict, ours: dict) -> dict:
    """The flat config of an older run, with the places of `ours` where what they name was moved alone."""
    places = {name: (theirs.get(name), ours.get(name)) for name in PLACES}
    moved = [name for name, (then, now) in places.items() if then and now and then != now and is_moved(then, now)]
    return theirs | {name: ours[name] for name in moved}


def with_its_rate(fields: dict) -> dict:
    """A flat config with the learning rate that it trains at in the place of the rates of all that can be trained."""
    table, field = "train.learning_rates.", "train.learning_rate"
    rates = {name.removeprefix(table): rate for name, rate in fields.items() if name.startswith(table)}
    own = rates.get(fields.get("method"), rates.get(fields.get("value_encoder.kind")))
    rest = {name: x for name, x in fields.items() if not name.startswith(table)}
    return rest | {field: rest.get(field) or own}


def beside_images(fields: dict) -> dict:
    """A flat config with the folder of its pairs told from that of its images, where it is beside them.

    A comparison has both in its workdir, which may be moved, or copied to another machine.
    """
    pairs, images = (pathlib.PurePath(fields.get(name) or "") for name in ("data.directory", "eval.drawn"))
    if not images.name or not pairs.is_relative_to(images.parent):
        return fields
    return fields | {"data.directory": str(pairs.relative_to(images.parent))}


def read_json(file: epath.Path, remedy: str):
    """What a JSON file of a run holds. Raises ValueError that names it where a kill or a full disk cut it short."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): {remedy}") from error


def read_gates(workdir: epath.Path) -> tuple:
    """The gates of a run's value encoder; none where they were not measured."""
    file = workdir / "eval" / "gates.json"
    return from_json(read_json(file, "remove it, and measure again with --mode=train") if file.exists() else None)


def read_config(workdir: epath.Path) -> dict:
    """The config.json of a run."""
    return read_json(workdir / "config.json", "remove it, and start the run with the config that it has")


def check_claim(workdir: epath.Path, config):
    """Looks whether what is in the workdir was made with the same config, in whatever place that and its files lay.

    Raises:
        ValueError: another config made the pairs or checkpoints here, and the differences.
    """
    file = workdir / "config.json"
    ours = json.loads(config.to_json())
    if file.exists() and any((workdir / made).exists() for made in ("preferences", "checkpoints")):
        schedule = ours["train"]["schedule"]
        # At a constant rate no step depends on how many follow.
        free = (*FREE, "train.steps") if schedule == "constant" else FREE
        both = as_now(read_config(workdir), ours), flatten(ours)
        both = [beside_images(with_its_rate(tree)) for tree in both]
        both[0] = where_moved(*both)
        found = differences(*({k: v for k, v in tree.items() if not k.startswith(free)} for tree in both))
        if any(line.startswith("config.train.steps:") for line in found):
            found.append(
                f"with config.train.schedule={schedule!r} the learning rates depend on the number of steps: to train"
                " on, export this run, and start another --workdir with config.value_encoder.start=EXPORT"
            )
        if found:
            raise ValueError(f"{workdir} holds a run of another config: name a new --workdir\n  " + "\n  ".join(found))


def claim(workdir: epath.Path, config):
    """Writes config.json, after check_claim; of process 0."""
    check_claim(workdir, config)
    write_json(workdir / "config.json", json.loads(config.to_json()))


def recipe(workdir: epath.Path) -> dict | None:
    """The config.json of a run, None where none was trained."""
    file = workdir / "config.json"
    return read_config(workdir) if (workdir / "checkpoints").exists() and file.exists() else None


def check_shared(workdir: epath.Path):
    """Raises ValueError, in every process, where some do not see what process 0 writes to the workdir."""
    if jax.process_count() == 1:
        return
    token = int(multihost_utils.broadcast_one_to_all(secrets.randbits(31)))
    sign = workdir / f".shared-{token}"
    with ending_together():
        if jax.process_index() == 0:
            sign.write_text("", encoding="utf-8")
    seen = multihost_utils.process_allgather(sign.exists())
    with ending_together():
        if jax.process_index() == 0:
            sign.unlink()
    if not seen.all():
        raise ValueError(
            f"{workdir} is not shared: processes {[int(i) for i in (~seen).nonzero()[0]]} do not see what process 0"
            " writes there: name a --workdir on a disk of all, or in a bucket (gs://...)"
        )
