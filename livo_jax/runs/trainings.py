"""Trainings of a comparison: which there are, of which seeds, and several of one method told as one."""

import copy
import pathlib

import numpy as np
from ml_collections import ConfigDict

from livo_jax.evaluation import metrics
from livo_jax.runs import further
from livo_jax.runs.check import problem_of
from livo_jax.runs.workdir import check_claim

MEASURED_COSTS = ("training_seconds", "images_per_second", "of_base")
POINT = ("step", "method", "value", "split", "metric")  # of a curve


def count_of(config, comparison) -> int:
    """How many trainings a comparison has of a method; 1 of one that trains nothing."""
    return comparison.get("trainings", 1) if config.train.steps else 1


def jobs_of(config, workdir, comparison) -> list[tuple]:
    """The jobs (config, workdir, comparison) of a method: one for each training of another seed."""
    jobs, shared = [], ConfigDict({name: x for name, x in comparison.items() if name != "methods"})
    for n in range(count_of(config, comparison)):
        own = copy.deepcopy(config)
        own.seed = config.seed + n
        place = workdir.with_name(f"{workdir.name}_{n}") if n else workdir
        jobs.append((own, place, shared))
    return jobs


def check(configs: dict, comparison):
    """Raises ValueError with all that would mix the trainings of methods."""
    problems, trainings = [], comparison.get("trainings", 1)
    if trainings < 1:
        problems.append(f"config.trainings={trainings}: choose at least 1")
    methods = [own.method for own in configs.values()]
    if twice := sorted({method for method in methods if methods.count(method) > 1}):
        problems.append(
            f"methods of one config.method, {', '.join(twice)}: give each its own, the column of the results"
        )
    if trainings > 1 and (random := [name for name, own in configs.items() if own.random_weights]):
        problems.append(
            f"config.trainings={trainings}: of {', '.join(random)} each would have a base of its own weights"
        )
    names = [
        place.name for name, own in configs.items() for _, place, _ in jobs_of(own, pathlib.Path(name), comparison)
    ]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"trainings and methods that would share a folder: {', '.join(twice)}")
    if problems:
        raise ValueError("\n  ".join(problems))


def check_claims(jobs: list[tuple]):
    """Raises ValueError with all of the trainings' workdirs that hold what another config made."""
    trained = [(place, without_judge(own)) for own, place, _ in jobs if own.train.steps]
    problems = [text for place, own in trained for text in problem_of(check_claim, place, own)]
    if problems:
        raise ValueError("\n".join(problems))


def without_judge(config):
    """The config that a method trains with: its images are measured afterwards."""
    only = copy.deepcopy(config)
    only.judge = ""
    return only


def combine(of_each: list[dict]) -> dict:
    """What `measure` found of the trainings of one method, as of one: means, and the pictures of the first."""
    first = of_each[0]
    if len(of_each) == 1:
        return first
    readings = [
        row if row["method"] == "base" else row | {"training": n}
        for n, of_training in enumerate(of_each)
        for row in of_training["readings"]
    ]
    curve = []
    for rows in zip(*(of_training["curve"] for of_training in of_each), strict=True):
        if len({tuple(row[name] for name in POINT) for row in rows}) > 1:
            raise ValueError(f"the trainings of {rows[0]['method']} have checkpoints of other steps: train them anew")
        means = [row["mean"] for row in rows]
        seconds = float(np.mean([row["seconds"] for row in rows]))
        curve.append(rows[0] | {"seconds": seconds, "mean": float(np.mean(means)), "trainings": means})
    costs = [of_training["costs"] for of_training in of_each]
    mean_costs = {name: float(np.mean([of[name] for of in costs])) for name in MEASURED_COSTS}
    numbers, attacked = (
        metrics.combine_trainings([of_training[name] for of_training in of_each]) for name in ("numbers", "attacked")
    )
    return first | {
        "numbers": numbers, "attacked": attacked, "readings": readings, "curve": curve,
        "costs": first["costs"] | mean_costs | {"trainings": len(of_each)},
        "further": first.get("further") and further.combine([of_training["further"] for of_training in of_each]),
    }  # fmt: skip
