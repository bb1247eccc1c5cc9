"""All methods in one run: trained, measured, reported, and resumed."""

import contextlib
import csv
import json
import os
import pickle
import runpy
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from etils import epath

from configs import ablations, compare, compare_flow, compare_tiny, compare_tuned, trainings_tiny
from livo_jax.evaluation.metrics import Measured, rows_of
from livo_jax.processes import is_raised_here
from livo_jax.runs import board, trainings
from livo_jax.runs import compare as runs_compare
from livo_jax.runs.checkpoint import Checkpoints
from livo_jax.runs.compare import compare as compare_methods
from livo_jax.runs.compare import write
from tests import small_run
from tests.data import test_data
from tests.small_run import ROOT


def command(workdir, *flags):
    return subprocess.run(
        [sys.executable, "run.py", "--config=configs/compare_tiny.py:smoke", f"--workdir={workdir}", *flags],
        cwd=ROOT, env=small_run.environment(), capture_output=True, text=True,
    )  # fmt: skip


def test_every_file_of_baselines_is_a_method():
    files = {path.stem for path in (ROOT / "configs" / "baselines").glob("[!_]*.py")}
    flow = compare_flow.get_config()
    assert {*flow.methods} < {"livo"} | files
    for config in (compare_tiny.get_config(), compare_tuned.get_config(), compare.get_config(), flow):
        assert config is flow or {*config.methods} == {"livo"} | files
        for name, own in config.methods.items():
            assert own.method == name and own.eval == config.methods.livo.eval, f"configs/baselines/{name}.py"


@pytest.mark.parametrize("module", [compare_tiny, compare_tuned, ablations, trainings_tiny])
def test_the_cost_is_told_beforehand(module):
    config = module.get_config()
    lines = board.cost(config, config.methods).splitlines()
    attacks = [line for line in lines if line.startswith("attacks")]
    header, base, *rows, total, readings, of_bytes, of_pairs = (line for line in lines if line not in attacks)
    assert [row.split()[0] for row in (base, *rows)] == ["base", *config.methods]
    (pairs,) = {row.split()[-1] for row in rows if row.startswith("livo ")}
    own = config.methods.livo.train
    assert pairs == f"{config.trainings * own.steps * own.batch_size:,}" and "judges" not in readings
    assert [line.split(":")[0] for line in attacks] == [f"attacks by {search}" for search in config.attacks]


@pytest.mark.parametrize("variant", ["", "parts"])
def test_ablations_change_one_thing_each(variant):
    config = ablations.get_config(variant)
    livo = config.methods.livo.to_dict()
    swept = {name for _, points in config.sweeps for _, name in points}
    assert swept == {*config.methods} and all(own.method == name for name, own in config.methods.items())
    for field, points in config.sweeps:
        assert "livo" in [name for _, name in points]
        for label, name in points:
            own = config.methods[name].to_dict()
            section, _, key = field.partition(".")
            assert str(own[section][key]) == label
            if field != "loss.form":  # whose constants are the baselines'
                own[section][key], own["method"] = livo[section][key], "livo"
                own["eval"]["keep_probabilities"] = livo["eval"]["keep_probabilities"]
                assert own == livo, name


def test_methods_that_would_not_be_measured_alike_are_refused(tmp_path):
    process = command(tmp_path, "--mode=evaluate", "--config.methods.words.sampling.steps=7")
    assert process.returncode != 0 and "config.methods.words.sampling differs from that of livo" in process.stderr
    process = command(tmp_path)
    assert process.returncode != 0 and "compares methods: give --mode=evaluate" in process.stderr
    assert not [*tmp_path.iterdir()]


def test_all_that_is_wrong_with_a_comparison_is_told_at_once_and_its_cost_before(tmp_path, capsys):
    """As by --mode=plan: a method's own fields under its name, and prompts that are not here beside the rest."""
    config = compare_tiny.get_config("smoke")
    for own in config.methods.values():
        own.eval.prompts = ("harm=own",)
        own.eval.prompt_sets.own.file = str(tmp_path / "none.csv")
    config.methods.sld.judging.subject = False
    config.methods.words.method = "magic"
    config.methods.sft.train.batch_size, config.trainings = 0, 0
    with pytest.raises(ValueError) as error:
        runs_compare.tell_cost(config, {"methods.sld.train.learning_rate": 1.0})
    lines = str(error.value).splitlines()
    assert lines[0] == "the config cannot work:" and len(lines) == 7
    for told in (
        "config.trainings=0", "config.methods.sld.judging differs from that of livo: methods are measured alike",
        "config.methods.words.method='magic', which trains nothing: choose from", "none.csv is missing",
        "config.methods.sld.train.learning_rate=1.0: config.methods.sld.method='sld' does not read it",
        "config.train.batch_size=0: choose at least 1",
    ):  # fmt: skip
        assert sum(told in line for line in lines) == 1, (told, lines)
    assert not capsys.readouterr().out, "of a method that there is not nobody knows the cost"
    config.methods.words.method = "words"
    with pytest.raises(ValueError):
        runs_compare.tell_cost(config)
    told = capsys.readouterr().out
    assert "UNet passes" in told and "without harm=own: " in told
    for own in config.methods.values():
        own.eval.prompt_sets.own.limit = 3
    with pytest.raises(ValueError, match="none.csv is missing"):
        runs_compare.tell_cost(config)
    assert "harm=own cannot be read: counted as the 3 prompts of its limit" in capsys.readouterr().out
    with pytest.raises(ValueError, match="config.methods is empty"):
        compare_methods(ml_collections.ConfigDict({"methods": {}}), tmp_path)


def test_pictures_are_blurred_where_those_of_any_method_are_harmful(tmp_path):
    value, image = "shape equality", np.zeros((8, 8, 3), np.uint8)
    numbers = {("base", value, "seen", "D1"): {"a cook": Measured(0.5, 4)}}

    def measured(method, harmful):
        sides, applied = {"base": [image], method: [image] * 2}, {method: [2]}
        picture = dict(value=value, split="seen", prompt="a cook", harmful=harmful, sides=sides, applied=applied)
        costs = dict(method=method, trained_parameters=1, training_seconds=1.0, images_per_second=1.0, of_base=1.0)
        return dict(
            numbers=numbers,
            attacked={},
            words=[],
            readings=[],
            pictures=[picture],
            curve=[],
            costs=costs,
            judge={"name": "shapeworld"},
        )

    config = ml_collections.ConfigDict({"methods": {}, "sweeps": ()})
    write([measured("livo", False), measured("words", True)], config, tmp_path)
    assert json.loads((tmp_path / "eval" / "results.json").read_text())["judges"] == [{"name": "shapeworld"}]
    assert json.loads((tmp_path / "eval" / "config.json").read_text()) == {"methods": {}, "sweeps": []}
    page = (tmp_path / "eval" / "report.html").read_text()
    assert '<figure class="harmful">' in page
    assert page.count(": the value is on 1 of 2 images, number 2<") == 2 and page.count("the value is on") == 2


def test_trainings_of_one_method_are_told_as_one(tmp_path):
    config = compare_tiny.get_config("smoke")
    config.trainings = 3
    jobs = trainings.jobs_of(config.methods.livo, tmp_path / "livo", config)
    assert [(own.seed, place.name) for own, place, _ in jobs] == [(0, "livo"), (1, "livo_1"), (2, "livo_2")]
    assert len(trainings.jobs_of(config.methods.words, tmp_path / "words", config)) == 1, "which trains nothing"

    config.methods.livo_1 = config.methods.livo.copy_and_resolve_references()
    config.methods.words.random_weights = True
    with pytest.raises(ValueError) as error:
        compare_methods(config, tmp_path)
    assert all(
        told in str(error.value) for told in ("one config.method, livo", "of words each", "share a folder: livo_1")
    )

    what, image = ("shape equality", "seen", "D1"), np.zeros((8, 8, 3), np.uint8)
    place = dict(zip(("value", "split", "prompt"), (*what[:2], "a cook")), index=0, applied="")
    point = dict(zip(("method", "value", "split", "metric"), ("livo", *what)), step=2)

    def measured(number):
        numbers = {("base", *what): {p: Measured(0.8, 4) for p in "ab"},
                   ("livo", *what): {"a": Measured(number, 4), "b": Measured(number + 0.1, 4)}}  # fmt: skip
        readings = [place | {"method": "base", "shape": "round"}, place | {"method": "livo", "shape": str(number)}]
        picture = dict(value=what[0], split="seen", prompt="a cook", harmful=False, sides={"base": [image]}, applied={})
        costs = dict(
            method="livo", trained_parameters=7, training_seconds=10 * number, images_per_second=1.0, of_base=1.0
        )
        curve = [point | {"seconds": number, "mean": number}]
        return dict(
            numbers=numbers,
            attacked={},
            words=[],
            readings=readings,
            pictures=[picture],
            curve=curve,
            costs=costs,
            judge={"name": "one"},
        )

    config = ml_collections.ConfigDict({"methods": {}, "sweeps": ()})
    write([trainings.combine([measured(x) for x in (0.1, 0.2, 0.3)])], config, tmp_path)

    def read(name):
        return json.loads((tmp_path / "eval" / f"{name}.json").read_text())

    base, livo = rows_of(read("results"), "results")
    assert livo["trainings"] == pytest.approx([0.15, 0.25, 0.35]) and livo["images"] == 24 and base["images"] == 8
    means = dict.fromkeys(("seconds", "mean"), pytest.approx(0.2))
    assert read("curves") == [point | means | {"trainings": [0.1, 0.2, 0.3]}]
    (costs,) = read("costs")
    assert costs["training_seconds"] == pytest.approx(2) and (costs["trained_parameters"], costs["trainings"]) == (7, 3)
    readings = list(csv.DictReader((tmp_path / "eval" / "readings.csv").read_text().splitlines()))
    assert [(row["method"], row["training"]) for row in readings] == [("base", ""), *(("livo", n) for n in "012")]


def test_workdirs_of_another_config_are_all_told_at_once(tmp_path):
    config = compare_tiny.get_config("smoke")
    jobs = [job for name in ("livo", "sft") for job in trainings.jobs_of(config.methods[name], tmp_path / name, config)]
    for own, place, _ in jobs:
        (place / "checkpoints").mkdir(parents=True)
        (place / "config.json").write_text(trainings.without_judge(own).to_json())
    trainings.check_claims(jobs)
    for own, *_ in jobs:
        own.train.batch_size += 1
    with pytest.raises(ValueError) as error:
        trainings.check_claims(jobs)
    assert str(error.value).count("config.train.batch_size: ") == 2 == str(error.value).count("name a new --workdir")


def test_what_a_worker_raises_on_purpose_comes_back_for_its_parent_to_raise(tmp_path):
    """A fault of the program keeps the worker's traceback."""
    config = compare_tiny.get_config("smoke").methods.livo
    config.train.batch_size = 0
    comparison = ml_collections.ConfigDict({"curve": {"points": 0, "images": 1}})
    told = runs_compare.measure_apart(config, tmp_path, comparison)
    assert isinstance(told, ValueError) and "config.train.batch_size=0" in str(told)
    with pytest.raises(ValueError, match="config.train.batch_size=0") as error:
        runs_compare.raise_or_keep(pickle.loads(pickle.dumps(told)))  # as it comes from another process
    assert is_raised_here(error.value), "so the command ends with its message alone"
    assert runs_compare.raise_or_keep({"numbers": {}}) == {"numbers": {}}
    with pytest.raises(AttributeError):
        runs_compare.measure_apart(None, tmp_path, comparison)


@pytest.mark.parametrize("end, status", [(SystemExit(143), 143), (KeyboardInterrupt(), 130)])
def test_a_worker_that_is_to_end_begins_no_other_job(monkeypatch, end, status):
    """Whose pool would take that for the job's result."""
    ended = []
    monkeypatch.setattr(runs_compare, "measure", Mock(side_effect=end))
    monkeypatch.setattr(os, "_exit", ended.append)
    runs_compare.measure_apart(None, None, None)
    assert ended == [status]


METHODS = ("dpo_unet", "livo", "words")
CONFIG = f"""
from configs import compare_tiny


def get_config():
    config = compare_tiny.get_config("smoke")
    for name, own in [*config.methods.items()]:
        own.model, own.random_weights, own.data.directory = "ROOT/model", True, "PAIRS"
        own.principles, own.mesh.data, own.sampling.batch_size = ("shape", "bloody"), 1, 8
        own.sampling.steps, own.eval.harmful_wordings, own.eval.left_alone_wordings = 2, {{}}, {{}}
        own.train.steps, own.eval.combinations, own.eval.auto = min(own.train.steps, 2), True, True
        own.eval.images_per_prompt = own.eval.harm_images_per_prompt = own.eval.left_alone_images = 2
        own.attack.kinds = ("harm", "bias")
        own.attack.prompts = own.attack.tokens = own.attack.noises = own.attack.queries = 1
        if name not in {METHODS}:
            del config.methods[name]
    config.curve.points, config.attacks = 1, ("queries",)
    return config
"""


def test_three_methods_from_start_to_end_with_an_interruption(root, tmp_path):
    """Two at a time in processes of their own, which end when their parent is killed; then one after the other."""
    file, workdir = tmp_path / "three.py", tmp_path / "run"
    pairs = test_data.make(tmp_path / "pairs", values=("shape equality", test_data.BLOODY))
    file.write_text(CONFIG.replace("ROOT", str(root)).replace("PAIRS", str(pairs)))
    start = [sys.executable, "run.py", f"--config={file}", f"--workdir={workdir}", "--mode=evaluate"]
    process = subprocess.Popen(
        start, cwd=ROOT, env=small_run.environment() | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip

    def drawn():
        return {path: path.stat().st_mtime_ns for path in workdir.glob("drawn/*/*.png")}

    try:
        while len({path.parent for path in drawn()}) < 2:  # the base's are drawn first
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        process.kill()
        process.communicate(timeout=60)  # until none that it started holds the pipe
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    before = drawn()  # each is whole or not there
    assert before

    config = runpy.run_path(str(file))["get_config"]()
    config.processes = 1
    results = compare_methods(config, workdir)
    after = drawn()
    assert before.items() <= after.items() and len(before) < len(after), "what was there is not drawn again"
    assert compare_methods(config, workdir) == results
    assert drawn() == after

    def read(name):
        return rows_of(json.loads((workdir / "eval" / f"{name}.json").read_text()), name)

    assert read("results") == results and results[0]["method"] == "base"
    named = {"base", "plain", "auto", *METHODS}  # plain: a value alone, beside several; auto: where it is found
    assert {row["method"] for row in results} == named
    places = [tuple(row[k] for k in ("method", "value", "split", "metric")) for row in results]
    assert len(places) == len({*places})
    assert {row["other"] for row in read("differences")} == named - {"livo"}
    assert {row["family"] for row in read("differences")} == {"livo against all others"}
    readings = list(csv.DictReader((workdir / "eval" / "readings.csv").read_text().splitlines()))
    assert {row["method"] for row in readings} == named
    places = [tuple(row[k] for k in ("method", "value", "split", "prompt", "index")) for row in readings]
    assert len(places) == len({*places}), "the base's once"
    costs = {row["method"]: row for row in read("costs")}
    assert costs.keys() == {*METHODS} and all(row["images_per_second"] > 0 for row in costs.values())
    assert min(costs[name]["trained_parameters"] for name in ("livo", "dpo_unet")) > 0
    assert costs["words"]["trained_parameters"] == 0
    for name in ("livo", "dpo_unet"):
        curve = [row for row in read("curves") if row["method"] == name]
        assert {row["step"] for row in curve} == {2} and "D1" in {row["metric"] for row in curve}
        assert [row["seconds"] for row in curve] == sorted(row["seconds"] for row in curve)
    attacked = {(row["method"], row["split"], row["metric"]) for row in read("attacks")}
    assert attacked >= {(name, "attacked by queries", m) for name in named - {"plain"} for m in ("R", "D1")}
    words = json.loads((workdir / "eval" / "attacks_found.json").read_text())
    assert len(words) == 8 and {(row["method"], row["search"]) for row in words} == {
        (name, "queries") for name in ("base", *METHODS)
    }
    page = (workdir / "eval" / "report.html").read_text()
    assert all(name in page for name in METHODS) and "attacked by queries" in page


def test_an_interruption_is_no_point_of_a_curve(tmp_path):
    config = compare_tiny.get_config("smoke").methods.livo
    config.checkpoint.every, config.train.steps = 2, 5
    checkpoints = Checkpoints(epath.Path(tmp_path), keep=4)
    for step in (2, 3, 4, 5):
        checkpoints.save(step, {"step": jnp.array(step)})
    checkpoints.wait()
    assert runs_compare.curve_steps(epath.Path(tmp_path), config) == [2, 4, 5]


@pytest.mark.slow
def test_all_methods_are_trained_measured_and_reported(tmp_path):
    process = command(tmp_path, "--mode=evaluate")
    assert process.returncode == 0, process.stderr
    methods = {*compare_tiny.get_config("smoke").methods}

    def read(name):
        return rows_of(json.loads((tmp_path / "eval" / f"{name}.json").read_text()), name)

    results = read("results")
    assert {row["method"] for row in results} == {"base"} | methods and results[0]["method"] == "base"
    places = [tuple(row[k] for k in ("method", "value", "split", "metric")) for row in results]
    assert len(places) == len({*places})
    differences = {row["other"] for row in read("differences")}
    assert differences == {"base"} | methods - {"livo"}
    costs = {row["method"]: row for row in read("costs")}
    assert costs.keys() == methods and all(row["images_per_second"] > 0 for row in costs.values())
    assert costs["livo"]["trained_parameters"] > 0 == costs["words"]["trained_parameters"]
    curve = [row for row in read("curves") if row["method"] == "livo"]
    assert {row["step"] for row in curve} == {1, 2, 3, 4} and {row["metric"] for row in curve} >= {"D1", "R"}
    assert [row["seconds"] for row in curve] == sorted(row["seconds"] for row in curve)
    page = (tmp_path / "eval" / "report.html").read_text()
    assert all(name in page for name in methods)

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "drawn").rglob("*.png")}
    process = command(tmp_path, "--mode=evaluate")
    assert process.returncode == 0, process.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "drawn").rglob("*.png")} == before
    assert read("results") == results, "the same, from what was drawn"
