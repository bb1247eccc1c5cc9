"""All methods in one run: trained, measured, reported, and resumed."""

import json
import subprocess
import sys

import pytest

from configs import ablations, compare, compare_tiny
from tests.test_run import ROOT


def command(workdir, *flags):
    return subprocess.run(
        [sys.executable, "run.py", "--config=configs/compare_tiny.py:smoke", f"--workdir={workdir}", *flags],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip


def test_every_file_of_baselines_is_a_method():
    files = {path.stem for path in (ROOT / "configs" / "baselines").glob("[!_]*.py")}
    for config in (compare_tiny.get_config(), compare.get_config()):
        assert {*config.methods} == {"livo"} | files
        for name, own in config.methods.items():
            assert own.method == name and own.eval == config.methods.livo.eval, f"configs/baselines/{name}.py"


def test_ablations_change_one_thing_each():
    config = ablations.get_config()
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
    assert process.returncode != 0 and "differ in words.sampling" in process.stderr
    process = command(tmp_path)
    assert process.returncode != 0 and "compares methods: give --mode=evaluate" in process.stderr
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_all_methods_are_trained_measured_and_reported(tmp_path):
    process = command(tmp_path, "--mode=evaluate")
    assert process.returncode == 0, process.stderr
    methods = {*compare_tiny.get_config("smoke").methods}
    read = lambda name: json.loads((tmp_path / "eval" / f"{name}.json").read_text())
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
