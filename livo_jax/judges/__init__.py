"""Judges: what reads from images whether a value is followed. A module here is a judge, but those with a _ first."""

import dataclasses
import functools
import hashlib
import importlib
import pathlib
import pkgutil
from collections.abc import Callable

import numpy as np

from livo_jax.files.settings import import_named

# What is read in images, arrays [B] by axis. Of a bias str: one of its attributes, UNSPECIFIED, or "" where it cannot
# be read. Of a harm float: its score, or nan where it cannot be read. Of "subject" str: one of the subjects, or "".
Reading = dict[str, np.ndarray]
UNSPECIFIED = "unspecified"  # the picture shows what a bias is about, but none of its attributes
# Of objects, as GenEval names them (Ghosh et al. 2023).
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


@dataclasses.dataclass(frozen=True)
class Judge:
    """Who reads images: judge(images [B, H, W, 3] uint8) -> Reading.

    An image of one colour, as a black one, shows nothing: whatever `read` makes of it, it cannot be read.

    Attributes:
        read: the function of images that reads them.
        pinned: what its readings and numbers depend on beside the images and the config, for JSON, as far as it is
            known: name, version, weights {file: sha256}, classes or questions, thresholds, harmful_from by value.
        thresholds: scores from which others call an image harmful, beside a value's own harmful_from.
        unspecified: whether a bias's axis may read UNSPECIFIED, whose share is then measured.
        objects: classes of those that it finds, which it reads as livo_jax/evaluation/objects.py has it; colours: that
            it reads of them.
        axes: those that it is asked for. Raises ValueError where a reading lacks one.
    """

    read: Callable[[np.ndarray], Reading]
    pinned: dict = dataclasses.field(default_factory=dict)
    thresholds: tuple[float, ...] = ()
    unspecified: bool = False
    objects: tuple[str, ...] = ()
    colours: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()

    @property
    def may_read(self) -> dict:
        """What metrics.prompt_metrics wants to know of it."""
        return {"thresholds": self.thresholds, "unspecified": self.unspecified}

    def __call__(self, images) -> Reading:
        blank, reading = uniform(images), {axis: np.asarray(x) for axis, x in self.read(images).items()}
        if missing := [axis for axis in self.axes if axis not in reading]:
            name = self.pinned.get("name", "judge")
            raise ValueError(f"{name} reads {', '.join(reading)}, not {', '.join(missing)}")
        if wrong := [axis for axis, x in reading.items() if x.shape != (len(images),)]:
            name = self.pinned.get("name", "judge")
            raise ValueError(
                f"{name} must read one thing of each of {len(images)} images, and not so {', '.join(wrong)}"
            )
        if not blank.any():
            return reading
        return {axis: np.where(blank, "" if x.dtype.kind == "U" else np.nan, x) for axis, x in reading.items()}


def known() -> list[str]:
    """The names of the judges here."""
    return [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]


def find_maker(config):
    """The make of config.judge, as `load` has it. Raises ValueError: there is none, and the judges that there are."""
    if ":" in config.judge:
        return import_named(config.judge, "config.judge")
    if config.judge not in known():
        raise ValueError(
            f"config.judge={config.judge!r}: choose from {', '.join(known())}, or name one of your own,"
            " package.module:Name"
        )
    return importlib.import_module(f"{__name__}.{config.judge}").make


def load(config, values, subjects) -> Judge:
    """The judge of config.judge.

    A module here is named by its name, and its make(config, values, subjects) makes the judge; another such make, of
    your own code, is named as "package.module:Name". It returns a Judge, or its `read` alone.

    Args:
        config: its `judge`, and `judging` where the module says so.
        values: the Values whose axes are to be read.
        subjects: what images may be of; the reading "subject" is one of them. There is none where
            config.judging.subject is False.

    Raises:
        ValueError: there is no such judge, and those that there are; or it cannot read the values, and why; or
            thresholds out of range and labels of an axis that no value has: all are listed.
        FileNotFoundError: its model is not here.
    """
    make = find_maker(config)
    asked = tuple(config.get("judging", {}).get("thresholds", ()))
    highest = max([1.0, *(value.highest for value in values)])
    problems = [
        f"config.judging.thresholds: {threshold!r} is not above 0 and at most {highest:g}"
        for threshold in asked
        if not 0 < threshold <= highest
    ]
    axes = tuple(value.axis for value in values)
    for text in config.get("judging", {}).get("labels", ()):
        label, _, place = text.rpartition("=")
        if label and place.partition(":")[0] not in axes:
            problems.append(
                f"config.judging.labels: {text!r} is of an axis that no value here has, leave it out; there are"
                f" {', '.join(axes) or 'none'}"
            )
    try:
        judge = make(config, values, subjects)
    except ValueError as error:
        raise ValueError("\n".join([*problems, str(error)])) from error
    if problems:
        raise ValueError("\n".join(problems))
    if not isinstance(judge, Judge):
        judge = Judge(judge, {"name": config.judge})
    thresholds, pinned = asked or judge.thresholds, judge.pinned
    if thresholds:
        pinned = pinned | {"thresholds": list(thresholds)}
    if least := {value.name: value.harmful_from for value in values if value.kind == "harm"}:
        pinned = pinned | {"harmful_from": least}
    return dataclasses.replace(judge, thresholds=thresholds, pinned=pinned, axes=axes)


def uniform(images) -> np.ndarray:
    """[B] bool: whether an image of [B, H, W, 3] uint8 has one colour throughout."""
    return (images == images[:, :1, :1]).all((1, 2, 3))


def hash_files(files: list[pathlib.Path]) -> dict[str, str]:
    """The sha256 of files, by name, which are different. A file that does not change is read once in a process."""
    names = [file.name for file in files]
    if len({*names}) < len(names):
        raise ValueError(f"files of one name, {', '.join(names)}: their hashes would be one")
    return {file.name: _sha256(file, file.stat().st_mtime_ns) for file in files}


@functools.cache
def _sha256(file: pathlib.Path, changed: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
