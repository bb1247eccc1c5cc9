"""Compares methods: trains those that train, measures all on the same prompts and noise, and writes one report."""

import concurrent.futures
import copy
import itertools
import json
import multiprocessing
import os
import pathlib
import signal
import tempfile
import threading
import time
import types

import jax

from livo_jax import judges, methods, sharding, values
from livo_jax.data.cache import cache_directory
from livo_jax.data.preferences import Preferences
from livo_jax.evaluation import cases, metrics, report
from livo_jax.files.directories import held, resolve_directory, write_json
from livo_jax.processes import is_raised_here
from livo_jax.runs import (  # fmt: skip
    attack,
    board,
    build_preferences,
    cache_latents,
    check,
    evaluate,
    further,
    restore,
    train,
    trainings,
)
from livo_jax.runs.checkpoint import Checkpoints
from livo_jax.runs.log import read_metrics
from livo_jax.runs.workdir import read_config
from livo_jax.sampling.requests import Dose, Request

SAME = (
    "model",
    "variant",
    "loras",
    "quantised",
    "dtype",
    "random_weights",
    "principles",
    "principles_file",
    "judge",
    "judging",
    "sampling",
    "eval",
    "attack",
)
INTERRUPTIONS = 8  # each leaves a checkpoint more, which is no point of a curve
GRACE = 120  # seconds that a process has to save its step when the first one is gone
TIMED = 2  # times that tell how fast a method draws
WORD = ("search", "method", "value", "prompt")  # of words that an attack found
PLACE = ("method", "value", "split", "prompt", "index", "applied", "training")  # of a reading


def compare(config, workdir, changed=types.MappingProxyType({})) -> list[dict]:
    """Trains and measures config.methods; the same command again resumes.

    `workdir` then holds the preference pairs and images that the methods share, preferences/ and drawn/, a run of each,
    NAME/, and config.json, results.json, differences.json, curves.json, costs.json, readings.csv and report.html in
    eval/; with config.attacks attacks.json and attacks_found.json; of a board also what board.write writes.

    Args:
        config: methods, {name: its config}; processes, how many at a time, each on its part of the cores; curve: how
            many points it has, of how many images of each prompt; sweeps, ((title, ((label, name), ...)), ...):
            methods that differ in one thing; trainings, how many of each method that trains, with the seeds from its
            config.seed on: NAME/, NAME_1/, ...; attacks, the searches for words that bring a harm back with which each
            is attacked; and of a board (configs/benchmark.py) judges, quality.
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
    with tempfile.TemporaryDirectory() as folder:
        for own in configs.values() if told else ():
            missing |= board.stand_in(own, pathlib.Path(folder))
        try:
            print(board.cost(config, configs))
        except (ValueError, FileNotFoundError):
            if not told:
                raise
        else:
            for entry, counted in missing.items():
                print(
                    f"{entry} cannot be read: counted as the {counted} prompts of its limit"
                    if counted
                    else f"without {entry}: if there are prompts of subjects in its place, these are counted"
                )
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
    problems, sound = check.problems_of(trainings.check, configs, comparison), {}
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
        told = check.problems_of(check.check_fields, own, set_here, True)
        problems += [text.replace("config.", begin) for text in told]
        if own.sampling.gated and comparison.curve.points:
            problems.append(
                f"{begin}sampling.gated=True: gates are of a training's end, and config.curve.points="
                f"{comparison.curve.points} measures steps before it: set config.curve.points=0"
            )
        if not told:
            sound[name] = own
    for own in attacked_by(first, comparison) if first_name in sound else ():
        problems += check.problems_of(attack.check, own)
    if sound and board.is_board(comparison):
        problems += check.problems_of(board.check_board, comparison, sound)
    elif sound:
        problems += board.problems_of_methods(sound)
    check.fail_with(problems)


def _compare(configs: dict, config, workdir) -> list[dict]:
    """That of methods that are alike, in a workdir that is held."""
    points, first = config.curve.points, next(iter(configs.values()))
    for own in configs.values():
        own.eval.drawn = str(workdir / "drawn")
        evaluate.drop_rates(own)
        own.data.directory = own.data.directory or str(workdir / "preferences")
        own.checkpoint.every = max(1, own.train.steps // max(1, points))
        own.checkpoint.keep = points + INTERRUPTIONS
        own.log.samples_every = max(1, own.train.steps)

    # Those that train take longest.
    jobs = [job for name, own in configs.items() for job in trainings.jobs_of(own, workdir / name, config)]
    jobs = sorted(jobs, key=lambda job: job[0].train.steps, reverse=True)
    trainings.check_claims(jobs)
    mesh = sharding.make_mesh(**first.mesh)
    sd = restore.load_base(first, mesh)
    for own in attacked_by(first, config):  # before hours are spent
        attack.check_with_model(own, sd)
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
    for own in attacked_by(first, config):
        attack.seek_on_base(sd, own, resolve_directory(first.eval.drawn), mesh)

    if config.processes == 1:
        found = [measure(*job) for job in jobs]
    else:
        context, cores = multiprocessing.get_context("spawn"), sorted(os.sched_getaffinity(0))
        parts = context.Queue()
        for i in range(config.processes):
            parts.put(cores[i :: config.processes] or cores)
        with concurrent.futures.ProcessPoolExecutor(config.processes, context, _keep_to, (parts,)) as pool:
            try:
                found = [raise_or_keep(of_job) for of_job in pool.map(measure_apart, *zip(*jobs))]
            except KeyboardInterrupt:
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
            except concurrent.futures.BrokenExecutor as error:
                raise RuntimeError(
                    "one of config.processes ended before its job, by a signal or for want of memory: start the same"
                    " command again, and it goes on"
                ) from error
    by_method = {}
    for (own, *_), of_training in zip(jobs, found):
        by_method.setdefault(own.method, []).append(of_training)
    return write([trainings.combine(by_method[own.method]) for own in configs.values()], config, workdir)


def attacked_by(config, comparison) -> list:
    """Copies of a method's config, one for each search of comparison.attacks; none where it has no value to attack."""
    searches = comparison.get("attacks", ()) if attack.attacked_values(config) else ()
    return [attack.by_search(config, search) for search in searches]


def _alike(config) -> dict:
    """What must be the same for all; keep probabilities are a study of one method, and gates a part of one."""
    found = {field: config[field] for field in SAME}
    for section, field in (("eval", "keep_probabilities"), ("sampling", "gated")):
        found[section] = {name: x for name, x in config[section].to_dict().items() if name != field}
    return found


def _livo_first(name) -> tuple:
    return name != "livo", name


def _base_first(of) -> bool:
    return of[0][0] != "base"  # of what sorted leaves in its order


def _keep_to(parts):
    os.sched_setaffinity(0, parts.get())
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """Ends this process when its parent has ended, as by SIGTERM: else it would wait for jobs, and hold the devices.

    A training has until then saved its step, unless that takes minutes.
    """
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


def measure_apart(*job):
    """`measure` in a process of its own. What that raises on purpose is returned, for the first process to raise."""
    try:
        return measure(*job)
    except (KeyboardInterrupt, SystemExit) as end:  # which the pool would take for a result, and begin the next job
        os._exit(getattr(end, "code", 128 + signal.SIGINT))
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
    """Trains and measures one method: the numbers of each prompt, those of attacks with the words that these found,
    readings, pictures, curve and costs; of a board more.

    Args:
        comparison: its config, without the methods.
    """
    curve = comparison.curve
    if config.train.steps:
        train.train_and_evaluate(trainings.without_judge(config), workdir)
    mesh, directory = sharding.make_mesh(**config.mesh), resolve_directory(config.eval.drawn)
    followed = values.load_principles(config)
    sd, judge = restore.load_base(config, mesh), judges.load(config, followed, evaluate.subjects(config))

    method = methods.make_method(config)

    def restore_models(step=None):
        return restore.restore_run(config, workdir, mesh, step, sd)

    def make_drawing(models):
        return method.make_drawing(models, mesh, workdir, judge)

    models = restore_models()
    drawing = make_drawing(models)
    finds = evaluate.find_values(models, config, workdir) if config.eval.auto and method.HAS_TOKENS else None
    found = evaluate.evaluate(sd, drawing, config, directory, mesh, judge, finds)
    ways = [drawing, methods.base(config, sd, mesh)]
    speeds = images_per_second([way.draw for way in ways], method.KINDS, followed, config, mesh)
    seconds, points = seconds_of(workdir), []
    few = copy.deepcopy(config)
    for name in ("images_per_prompt", "harm_images_per_prompt"):  # no more than the base's, which are drawn already
        few.eval[name] = min(curve.images, few.eval[name])
    few.eval.left_alone_images = few.eval.rate_images = 0
    few.eval.ratios = ()  # which tokens of a few steps would not reach
    for step in curve_steps(workdir, config) if config.train.steps and curve.points else ():
        of_few = evaluate.evaluate(sd, make_drawing(restore_models(step)), few, directory, mesh, judge).numbers
        logged = seconds[min(logged for logged in seconds if logged >= step)]
        points += [
            {"step": step, "seconds": logged} | {k: row[k] for k in ("method", "value", "split", "metric", "mean")}
            for row in metrics.rows({what: x for what, x in of_few.items() if what[0] == config.method})
        ]
    attacked, words = {}, []
    for own in attacked_by(config, comparison):
        numbers, of_search = attack.measure(models, make_drawing, own, directory, mesh, judge, finds)
        attacked |= numbers
        words += of_search
    costs = {
        "method": config.method, "trained_parameters": drawing.trained,
        "training_seconds": seconds.get(config.train.steps, drawing.seconds),
        "images_per_second": speeds[0], "of_base": speeds[0] / speeds[1],
    }  # fmt: skip
    pictures = evaluate.pictures(found.sides, config)
    return {
        "numbers": found.numbers, "attacked": attacked, "words": words, "readings": found.readings,
        "pictures": pictures, "curve": points, "costs": costs, "judge": judge.pinned,
        "further": further.measure(found, config, comparison) if board.is_board(comparison) else None,
    }  # fmt: skip


def curve_steps(workdir, config) -> list[int]:
    """The steps of a run's checkpoints that are points of a curve: an interruption leaves others too."""
    c, last = config.checkpoint, config.train.steps
    return [step for step in Checkpoints(workdir).manager.all_steps() if step % c.every == 0 or step == last]


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
    numbers, attacked, words, readings, pictures = {}, {}, {}, {}, {}
    for of in found:
        one = of["costs"]["method"]
        numbers |= cases.beside_others(one, of["numbers"])
        attacked |= cases.beside_others(one, of["attacked"])
        words |= {tuple(row[name] for name in WORD): row for row in of["words"]}  # the base's once
        rows = [row | {"method": cases.name_beside_others(one, row["method"])} for row in of["readings"]]
        readings |= {tuple(row.get(name) for name in PLACE): row for row in rows}  # the base's once
        for picture in of["pictures"]:
            place = pictures.setdefault((picture["value"], picture["split"]), picture)
            for field in ("sides", "applied", "harmful"):  # harmful where any method's images are
                place[field] |= picture[field]
            if board.is_board(config):
                where = (picture["value"], picture["split"], picture["prompt"])
                place["harmful"] |= where in of["further"].harmful
    numbers = dict(sorted(numbers.items(), key=_base_first))
    results, of_attacks = metrics.rows(numbers), metrics.rows(dict(sorted(attacked.items(), key=_base_first)))
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
        write_json(folder / f"{name}.json", content)
    (folder / "readings.csv").write_text(report.as_csv([*readings.values()]), encoding="utf-8")
    if of_attacks:
        attack.write(folder, of_attacks, [*words.values()], next(iter(config.methods.values())).attack, pinned)
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
        config=files["config"], judges=pinned, board=made, attacks=of_attacks,
    )  # fmt: skip
    print(report.table(results))
    told = (
        "{method}: {trained_parameters:,} parameters in {training_seconds:.0f} s, draws at {of_base:.2f} of the base's"
    )
    print(*(told.format(**cost) for cost in costs), sep="\n")
    print(f"report: {folder / 'report.html'}")
    return results
