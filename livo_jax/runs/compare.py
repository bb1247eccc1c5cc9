"""Compares methods: trains those that train, measures all on the same prompts and noise, and writes one report."""

import concurrent.futures
import copy
import itertools
import json
import multiprocessing
import os
import pathlib
import time
import types

import jax
import numpy as np
from ml_collections import ConfigDict

from livo_jax import judges, methods, sharding, values
from livo_jax.data.cache import cache_directory
from livo_jax.data.preferences import Preferences
from livo_jax.evaluation import cases, metrics, report
from livo_jax.files.directories import held, resolve_directory
from livo_jax.processes import is_raised_here
from livo_jax.runs import board, build_preferences, cache_latents, check, evaluate, fields, further, restore, train
from livo_jax.runs.checkpoint import Checkpoints
from livo_jax.runs.log import read_metrics
from livo_jax.runs.workdir import check_claim, read_config
from livo_jax.sampling.requests import Dose, Request

SAME = (
    "model",
    "variant",
    "loras",
    "dtype",
    "random_weights",
    "principles",
    "principles_file",
    "judge",
    "judging",
    "sampling",
    "eval",
)
TIMED = 2  # times that tell how fast a method draws
MEASURED_COSTS = ("training_seconds", "images_per_second", "of_base")
POINT = ("step", "method", "value", "split", "metric")  # of a curve
PLACE = ("method", "value", "split", "prompt", "index", "applied", "training")  # of a reading


def compare(config, workdir, changed=types.MappingProxyType({})) -> list[dict]:
    """Trains and measures config.methods; the same command again resumes.

    `workdir` then holds the preference pairs and images that the methods share, preferences/ and drawn/, a run of each,
    NAME/, and config.json, results.json, differences.json, curves.json, costs.json, readings.csv and report.html in
    eval/; of a board also what board.write writes.

    Args:
        config: methods, {name: its config}; processes, how many at a time, each on its part of the cores; curve: how
            many points it has, of how many images of each prompt; sweeps, ((title, ((label, name), ...)), ...):
            methods that differ in one thing; trainings, how many of each method that trains, with the seeds from its
            config.seed on: NAME/, NAME_1/, ...; and of a board (configs/benchmark.py) judges, quality.
        changed: {field: value} of what the command line sets.

    Raises:
        ValueError: as check_comparison; and what training raises.
        FileExistsError: another process compares in `workdir`.
    """
    workdir = resolve_directory(workdir)
    configs = configs_of(config)
    check_comparison(config, configs, changed)
    if board.is_board(config) and jax.process_index() == 0:
        print(board.cost(config, configs), flush=True)
    with held(workdir, "compares methods in"):
        return _compare(configs, config, workdir)


def tell_cost(config, changed=types.MappingProxyType({})):
    """Prints what a comparison will cost, also where that is known although something is wrong. Arguments as `compare`.

    Raises:
        ValueError: as check_comparison, after it has printed.
    """
    configs = configs_of(config)
    told = check.problem_of(check_comparison, config, configs, changed)
    missing = {}
    for own in configs.values() if told else ():
        readable = board.readable_prompts(own)
        missing |= dict.fromkeys(entry for entry in own.eval.prompts if entry not in readable)
        own.eval.prompts = readable
    try:
        print(board.cost(config, configs))
    except (ValueError, FileNotFoundError):
        if not told:
            raise
    else:
        if missing:
            print(f"without {', '.join(missing)}: if there are prompts of subjects in their place, these are counted")
    if told:
        raise ValueError("\n".join(told))


def configs_of(comparison) -> dict:
    """Copies of the methods' configs, LiVO's first."""
    return {name: copy.deepcopy(comparison.methods[name]) for name in sorted(comparison.methods, key=_livo_first)}


def check_comparison(comparison, configs: dict, changed=types.MappingProxyType({})):
    """Raises ValueError with all that is wrong with a comparison, or board, and shows before anything is drawn.

    There are no methods, or they would not be measured alike; fields that a method does not read; and what each of them
    cannot work with. `configs`: of the methods. `changed`: {field: value} of what the command line sets.
    """
    if not configs:
        raise ValueError("config.methods is empty: name the methods to compare, as configs/compare.py does")
    first_name, first = next(iter(configs.items()))
    problems, sound = check.problems_of(check_trainings, configs, comparison), {}
    for name, own in configs.items():
        alike = _alike(first)
        problems += [
            f"config.methods.{name}.{field} differs from that of {first_name}: methods are measured alike, set it for"
            " each of them"
            for field, x in _alike(own).items()
            if x != alike[field]
        ]
        begin = f"config.methods.{name}."
        set_here = {f"config.{field}".removeprefix(begin): x for field, x in changed.items()}
        set_here = {field: x for field, x in set_here.items() if not field.startswith("config.")}
        told = check.problems_of(fields.check, own, set_here, True)
        problems += [text.replace("config.", begin) for text in told]
        if not told:
            sound[name] = own
    if sound and board.is_board(comparison):
        problems += check.problems_of(board.check_board, comparison, sound)
    elif sound:
        problems += board.problems_of_methods(sound)
    check.fail_with(problems)


def _compare(configs: dict, config, workdir) -> list[dict]:
    """That of methods that are alike, in a workdir that is held."""
    points, first = config.curve.points, next(iter(configs.values()))
    for own in configs.values():
        own.eval.drawn, own.eval.rate_images = str(workdir / "drawn"), 0
        own.data.directory = own.data.directory or str(workdir / "preferences")
        own.checkpoint.every, own.checkpoint.keep = max(1, own.train.steps // max(1, points)), points + 1
        own.log.samples_every = max(1, own.train.steps)

    # Those that train take longest.
    jobs = [job for name, own in configs.items() for job in trainings_of(own, workdir / name, config)]
    jobs = sorted(jobs, key=lambda job: job[0].train.steps, reverse=True)
    check_claims(jobs)
    mesh = sharding.make_mesh(**first.mesh)
    sd = restore.load_base(first, mesh)
    if not resolve_directory(first.data.directory).exists() and any(own.train.steps for own in configs.values()):
        build_preferences.build(
            first, first.data.directory, None if first.random_weights or jax.process_count() > 1 else sd
        )
    cached = [own for own in configs.values() if own.train.steps and own.data.cache]
    if cached:
        most = copy.deepcopy(cached[0])  # one cache for all, with the prompts of each
        for name in ("beside", "anchors"):
            most.data[name] = max(own.data[name] for own in cached)
        preferences = Preferences(most.data.directory)
        shared = preferences.directory / "cache"  # pairs that cannot be written have none: each run has its own
        if cache_directory(preferences, workdir, sd, most) == shared and not shared.exists():
            local = jax.process_count() > 1
            cache_latents.write(
                preferences, restore.load_base(first, sharding.make_local_mesh()) if local else sd, most
            )
    evaluate.draw_base(sd, first, resolve_directory(first.eval.drawn), mesh)

    if config.processes == 1:
        found = [measure(*job) for job in jobs]
    else:
        context, cores = multiprocessing.get_context("spawn"), sorted(os.sched_getaffinity(0))
        parts = context.Queue()
        for i in range(config.processes):
            parts.put(cores[i :: config.processes] or cores)
        with concurrent.futures.ProcessPoolExecutor(config.processes, context, _keep_to, (parts,)) as pool:
            found = [raise_or_keep(of_job) for of_job in pool.map(measure_apart, *zip(*jobs))]
    by_method = {}
    for (own, *_), of_training in zip(jobs, found):
        by_method.setdefault(own.method, []).append(of_training)
    return write([combine(by_method[own.method]) for own in configs.values()], config, workdir)


def check_trainings(configs: dict, comparison):
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
        place.name for name, own in configs.items() for _, place, _ in trainings_of(own, pathlib.Path(name), comparison)
    ]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"trainings and methods that would share a folder: {', '.join(twice)}")
    if problems:
        raise ValueError("\n  ".join(problems))


def check_claims(jobs: list[tuple]):
    """Raises ValueError with all of the trainings' workdirs that hold what another config made."""
    trained = [(place, without_judge(own)) for own, place, _ in jobs if own.train.steps]
    problems = [text for place, own in trained for text in check.problem_of(check_claim, place, own)]
    if problems:
        raise ValueError("\n".join(problems))


def without_judge(config):
    """The config that a method trains with: its images are measured afterwards."""
    only = copy.deepcopy(config)
    only.judge = ""
    return only


def trainings_of(config, workdir, comparison) -> list[tuple]:
    """The jobs (config, workdir, comparison) of a method: one for each training of another seed."""
    jobs, shared = [], ConfigDict({name: x for name, x in comparison.items() if name != "methods"})
    for n in range(comparison.get("trainings", 1) if config.train.steps else 1):
        own = copy.deepcopy(config)
        own.seed = config.seed + n
        place = workdir.with_name(f"{workdir.name}_{n}") if n else workdir
        jobs.append((own, place, shared))
    return jobs


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
    numbers = metrics.combine_trainings([of_training["numbers"] for of_training in of_each])
    return first | {
        "numbers": numbers, "readings": readings, "curve": curve,
        "costs": first["costs"] | mean_costs | {"trainings": len(of_each)},
        "further": first.get("further") and further.combine([of_training["further"] for of_training in of_each]),
    }  # fmt: skip


def _alike(config) -> dict:
    """What must be the same for all; keep probabilities are a study of one method."""
    found = {field: config[field] for field in SAME}
    return found | {"eval": {k: x for k, x in config.eval.to_dict().items() if k != "keep_probabilities"}}


def _livo_first(name) -> tuple:
    return name != "livo", name


def _keep_to(parts):
    os.sched_setaffinity(0, parts.get())


def measure_apart(*job):
    """`measure` in a process of its own. What that raises on purpose is returned, for the first process to raise."""
    try:
        return measure(*job)
    except Exception as error:
        if not is_raised_here(error):
            raise
        return error


def raise_or_keep(of_job):
    """What measure_apart returned of a job, unless that is an error."""
    if isinstance(of_job, Exception):
        raise of_job
    return of_job


def measure(config, workdir, comparison) -> dict:
    """Trains and measures one method: the numbers of each prompt, readings, pictures, curve and costs; of a board more.

    Args:
        comparison: its config, without the methods.
    """
    curve = comparison.curve
    if config.train.steps:
        train.train_and_evaluate(without_judge(config), workdir)
    mesh, directory = sharding.make_mesh(**config.mesh), resolve_directory(config.eval.drawn)
    followed = values.load_principles(config)
    sd, judge = restore.load_base(config, mesh), judges.load(config, followed, evaluate.subjects(config))

    method = methods.make_method(config)

    def restore_drawing(step=None):
        models = restore.restore_run(config, workdir, mesh, step, sd)
        return method.make_drawing(models, mesh, workdir, judge)

    drawing = restore_drawing()
    found = evaluate.evaluate(sd, drawing, config, directory, mesh, judge)
    ways = [drawing, methods.base(config, sd, mesh)]
    speeds = images_per_second([way.draw for way in ways], method.KINDS, followed, config, mesh)
    seconds, points = seconds_of(workdir), []
    few = copy.deepcopy(config)
    for name in ("images_per_prompt", "harm_images_per_prompt"):  # no more than the base's, which are drawn already
        few.eval[name] = min(curve.images, few.eval[name])
    few.eval.left_alone_images = 0
    for step in Checkpoints(workdir).manager.all_steps() if config.train.steps and curve.points else ():
        of_few = evaluate.evaluate(sd, restore_drawing(step), few, directory, mesh, judge).numbers
        logged = seconds[min(logged for logged in seconds if logged >= step)]
        points += [
            {"step": step, "seconds": logged} | {k: row[k] for k in ("method", "value", "split", "metric", "mean")}
            for row in metrics.rows({what: x for what, x in of_few.items() if what[0] == config.method})
        ]
    costs = {
        "method": config.method, "trained_parameters": drawing.trained,
        "training_seconds": seconds.get(config.train.steps, drawing.seconds),
        "images_per_second": speeds[0], "of_base": speeds[0] / speeds[1],
    }  # fmt: skip
    pictures = evaluate.pictures(found.sides, config, drawing.tokens)
    return {
        "numbers": found.numbers, "readings": found.readings, "pictures": pictures, "curve": points, "costs": costs,
        "judge": judge.pinned,
        "further": further.measure(found, config, comparison) if board.is_board(comparison) else None,
    }  # fmt: skip


def seconds_of(workdir) -> dict[int, float]:
    """For each logged step of a training the seconds that it took until there, without compilation and drawing."""
    rows, total, last, seconds = read_metrics(workdir), 0.0, 0, {}
    batch_size = read_config(workdir)["train"]["batch_size"] if rows else 0
    for row in rows:
        if "train/pairs_per_sec" in row:
            total += (row["step"] - last) * batch_size / row["train/pairs_per_sec"]
            seconds[row["step"]], last = total, row["step"]
    return seconds


def images_per_second(ways, kinds, found, config, mesh) -> list[float]:
    """How fast each of `ways` draws a batch with the first value of these kinds: the best of TIMED times, compiled."""
    dose = next(Dose(value.statement) for value in found if value.kind in kinds)
    subjects, n = itertools.cycle(evaluate.subjects(config)), config.sampling.batch_size * sharding.batch_parts(mesh)
    requests = [Request(f"a {next(subjects)}", i, (dose,)) for i in range(n)]
    best = [float("inf")] * len(ways)
    for round in range(1 + TIMED):
        for i, draw in enumerate(ways):
            start = time.perf_counter()
            draw(requests)
            if round:  # the first compiles
                best[i] = min(best[i], time.perf_counter() - start)
    return [len(requests) / seconds for seconds in best]


def write(found: list[dict], config, workdir) -> list[dict]:
    """What `measure` found of each method, as one report; the base is the same in all."""
    numbers, readings, pictures = {}, {}, {}
    for of in found:
        one = of["costs"]["method"]
        numbers |= cases.beside_others(one, of["numbers"])
        rows = [row | {"method": cases.name_beside_others(one, row["method"])} for row in of["readings"]]
        readings |= {tuple(row.get(name) for name in PLACE): row for row in rows}  # the base's once
        for picture in of["pictures"]:
            place = pictures.setdefault((picture["value"], picture["split"]), picture)
            for field in ("sides", "applied", "harmful"):  # harmful where any method's images are
                place[field] |= picture[field]
            if board.is_board(config):
                where = (picture["value"], picture["split"], picture["prompt"])
                place["harmful"] |= where in of["further"].harmful
    numbers = dict(sorted(numbers.items(), key=lambda of: of[0][0] != "base"))  # stable
    results = metrics.rows(numbers)
    if jax.process_index() > 0:
        return results
    curves, costs = sum((of["curve"] for of in found), []), [of["costs"] for of in found]
    differences = metrics.differences(numbers, "livo")
    folder = workdir / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    pinned = [found[0]["judge"]]  # one reads the images of all
    files = {"results": metrics.document(results, pinned), "differences": metrics.document(differences, pinned)}
    files["config"] = json.loads(config.to_json())
    for name, content in (files | {"curves": curves, "costs": costs}).items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    (folder / "readings.csv").write_text(report.as_csv([*readings.values()]), encoding="utf-8")
    made = None
    if board.is_board(config):
        of_methods = {of["costs"]["method"]: of["further"] for of in found}
        card = board.make_card(config, found[0]["further"], pinned[0])
        made = board.write(folder, f"Board: {workdir.name}", results, costs, of_methods, card)
    sweeps = [(title, [(label, method, "") for label, method in points]) for title, points in config.sweeps]
    for name, own in config.methods.items():
        if probabilities := own.eval.keep_probabilities:
            points = [(f"{p:g}", name, cases.kept("", p)) for p in probabilities]
            sweeps.append(("keep probability" if name == "livo" else f"keep probability of {name}", points))
    report.write(
        folder / "report.html", title=f"LiVO and others: {workdir.name}", results=results, metrics=[], curves=curves,
        numbers=numbers, differences=differences, costs=costs, sweeps=sweeps, pictures=list(pictures.values()),
        config=files["config"], judges=pinned, board=made,
    )  # fmt: skip
    print(report.table(results))
    told = (
        "{method}: {trained_parameters:,} parameters in {training_seconds:.0f} s, draws at {of_base:.2f} of the base's"
    )
    print(*(told.format(**cost) for cost in costs), sep="\n")
    print(f"report: {folder / 'report.html'}")
    return results
