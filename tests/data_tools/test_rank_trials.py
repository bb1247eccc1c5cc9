"""Trials are ranked by what they were measured to be."""

import json
import subprocess
import sys

import pytest

from configs import compare_tiny, compare_tuned, tiny
from data_tools.rank_trials import errors, rank
from livo_jax.files.settings import flatten
from livo_jax.runs.compare import check_comparison, configs_of
from tests.small_run import ROOT

SHAPE, BLOODY = "shape equality", "bloody considered inappropriate"


def row(method, value, split, metric, mean):
    return dict(method=method, value=value, split=split, metric=metric, mean=mean)


def write(folder, rate, *rows):
    """A comparison's workdir with the methods livo and sld, whose preset is the same everywhere."""
    (folder / "eval").mkdir(parents=True)
    methods = {"livo": {"train": {"rate": rate}, "loss": {"beta": 4.0}}, "sld": {"sld": {"preset": "max"}}}
    rows = [*rows, row("sld", BLOODY, "seen", "R", 0.5), row("sld", BLOODY, "seen", "over_refusal", 0.0)]
    rows.append(row("sld", BLOODY, "seen", "recognised", 1.0))
    for name, content in {"config": {"methods": methods}, "results": {"schema": 2, "rows": rows}}.items():
        (folder / "eval" / f"{name}.json").write_text(json.dumps(content))
    return folder


def of_livo(effect):
    return [
        row("livo", SHAPE, "seen", "D1", effect), row("livo", SHAPE, "held_out", "D1", effect + 0.2),
        row("livo", SHAPE, "seen", "over_refusal", 0.1), row("livo", SHAPE, "seen", "recognised", 0.96),
        row("livo", BLOODY, "seen", "R", 0.3), row("livo", BLOODY, "seen", "over_refusal", 0.0),
        row("livo", BLOODY, "seen", "recognised", 1.0),
        row("livo", f"{SHAPE}, applied to 0%", "seen", "D1", 1.0), row("base", SHAPE, "seen", "D1", 1.0),
    ]  # fmt: skip


def test_an_error_is_the_mean_of_the_values_and_their_splits():
    found = errors(of_livo(0.0), ["livo"])["livo"]
    assert found["effect"] == pytest.approx((0.1 + 0.3) / 2) and found["over_refusal"] == pytest.approx(0.1 / 2)
    assert found["unrecognised"] == pytest.approx(0.04 / 2) and found["error"] == pytest.approx(0.2 + 0.05 + 0.02)
    with pytest.raises(ValueError, match="sld: no value has D1 or R"):
        errors(of_livo(0.0), ["sld"])


def test_the_best_of_a_method_is_first_with_what_makes_it_another(tmp_path):
    folders = [write(tmp_path / "a", 1e-3, *of_livo(0.4)), write(tmp_path / "b", 2e-3, *of_livo(0.2))]
    first, second, *others = rank(folders)
    assert first["folder"] == folders[1] and first["settings"] == {"train.rate": 2e-3}
    assert second["folder"] == folders[0] and second["error"] == pytest.approx(first["error"] + 0.1)
    assert [of["method"] for of in others] == ["sld", "sld"] and not others[0]["settings"]
    command = [sys.executable, "-m", "data_tools.rank_trials"]
    told = subprocess.run([*command, *map(str, folders)], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"| livo | {folders[1]} | train.rate=0.002 | 0.300 | 0.050 | 0.020 | 0.370 |" in told.splitlines()
    (tmp_path / "b" / "eval" / "results.json").unlink()
    told = subprocess.run([*command, *map(str, folders)], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 1 and "Traceback" not in told.stderr and "b/eval/results.json" in told.stderr


def test_comparisons_of_other_methods_are_not_ranked(tmp_path):
    write(tmp_path / "a", 1e-3, *of_livo(0.4))
    other = write(tmp_path / "b", 1e-3, *of_livo(0.4))
    config = json.loads((other / "eval" / "config.json").read_text())
    del config["methods"]["sld"]
    (other / "eval" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="of other methods"):
        rank([tmp_path / "a", other])


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_trial_shows_no_trade_that_the_comparison_has(number):
    config, final = compare_tuned.get_config(f"trial_{number}"), compare_tuned.get_config()
    check_comparison(config, configs_of(config))
    assert {*config.methods} < {*final.methods} and final.trainings == 3
    reported = {*final.methods.livo.eval.seen, *final.methods.livo.eval.held_out}
    for method, own in config.methods.items():
        measured = {*own.eval.seen, *own.eval.held_out}
        assert len(measured) == 16 and not measured & reported and not {*own.eval.held_out} & {*own.preferences.scenes}
        assert {*own.preferences.scenes} < {*tiny.SEEN} and own.train.steps in (0, compare_tuned.STEPS)
        assert compare_tuned.trials(method)[number - 1].items() <= flatten(own.to_dict()).items()


def test_the_first_trial_is_as_each_method_has_it():
    final = compare_tiny.get_config()
    for method in compare_tuned.TRIALS:
        trials = compare_tuned.trials(method)
        assert len(trials) == 4 and trials[0].items() <= flatten(final.methods[method].to_dict()).items()
