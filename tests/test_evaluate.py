import numpy as np
import pytest

from configs import tiny
from livo_jax import evaluate, values
from livo_jax.generate import Dose


def test_discrepancies_by_hand():
    assert evaluate.discrepancy([25, 25]) == (0.0, 0.0)
    d1, d2 = evaluate.discrepancy([40, 10])
    assert d1 == pytest.approx(0.6) and d2 == pytest.approx(np.sqrt(2 * 0.3**2))
    d1, d2 = evaluate.discrepancy([50, 0, 0, 0, 0])
    assert d1 == 1.0 and d2 == pytest.approx(np.sqrt(0.8**2 + 4 * 0.2**2))
    assert evaluate.discrepancy([0, 0]) == evaluate.discrepancy([7, 0]), "nothing can be read: the worst"


def test_spoilt_pictures_do_not_look_fair():
    """A body that cannot be read counts in `readable`, and leaves D1 as it was."""
    shape, _ = values.load(("shape", "colour"))
    reading = {"shape": np.array(["round"] * 8 + [""] * 2), "subject": np.array(["baker"] * 9 + [""])}
    metrics = evaluate.prompt_metrics(shape, "baker", reading)
    assert metrics == pytest.approx({"D1": 1.0, "D2": np.sqrt(0.5), "readable": 0.8, "recognised": 0.9})


def test_the_distance_from_a_target():
    shape, _ = values.load(("shape", "colour"))
    reading = {"shape": np.array(["round"] * 8 + ["square"] * 2 + [""])}
    metrics = evaluate.prompt_metrics(shape, "baker", reading, {"round": 0.7, "square": 0.3})
    assert metrics["TV"] == pytest.approx(0.1) and metrics["D1"] == pytest.approx(0.6)


def test_combinations_are_measured_where_the_config_says_so():
    config, three = tiny.get_config("smoke"), values.load(("shape", "colour", "bloody"))
    shape, colour, bloody = (value.statement for value in three)
    assert {(case.name, case.method) for case in evaluate.cases(config, three)} == {
        (value.statement, method) for value in three for method in ("base", "livo")
    }
    config.eval.combinations = True
    cases = {}
    for case in evaluate.cases(config, three):
        cases.setdefault((case.name, case.method), []).append(case)
    assert len(cases) == 2 * 3 + 3 * 6 and all(len(found) == 4 for found in cases.values())
    for name in (f"{shape} + {bloody}", f"{bloody} + {shape}"):
        for case in cases[name, "livo"]:
            assert all("bloody" in r.prompt and Dose(bloody) in r.values for r in case.requests)
            assert sum(Dose(shape) in r.values for r in case.requests) == len(case.requests) / 2
    (case, *_) = cases[f"{colour} + {shape}", "plain"]
    assert {r.values for r in case.requests} == {(Dose(colour),)} and case.value.name == "colour"


def test_strengths_are_measured_where_the_config_says_so():
    config, two = tiny.get_config("smoke"), values.load(("shape", "bloody"))
    config.eval.strengths = (0.5,)
    cases = evaluate.of_strengths(config, two, lambda value, requests: {"round": 0.9, "square": 0.1})
    assert len(cases) == 2 * 3 * 4, "values, methods and prompts"
    for case in cases:
        strength = {"base": (), "plain": (Dose(case.value.statement),), "livo": (Dose(case.value.statement, 0.5),)}
        assert {r.values for r in case.requests} == {strength[case.method]} and len(case.requests) == 4
        assert (case.target is not None) == (case.value.name == "shape")


def test_ratios_are_measured_where_the_config_says_so():
    config, two = tiny.get_config("smoke"), values.load(("shape", "bloody"))
    shape = two[0].statement
    arms = {f"{shape}: {a}": {b: float(a == b) for b in ("round", "square")} for a in ("round", "square")}
    rates = {shape: {"": {"round": 0.5, "square": 0.5}} | arms}
    config.eval.ratios = ("equal", '{"round": 0.75, "square": 0.25}')
    cases = evaluate.of_ratios(config, two, rates)
    assert len(cases) == 2 * 3 * 4, "ratios, methods and prompts"
    for case in cases:
        assert {r.prompt for r in case.requests} == {f"a photo of a {case.subject}"} and len(case.requests) == 4
        dealt = [r.values for r in case.requests].count((Dose(f"{shape}: round"),))
        assert dealt == {"base": 0, "plain": 0, "livo": round(4 * case.target["round"])}[case.method]


def test_harm_rate():
    (bloody,) = values.load(("bloody",))
    reading = {"red": np.array([0, 11, 12, 90]), "subject": np.array(["baker"] * 4)}
    assert evaluate.prompt_metrics(bloody, "baker", reading) == {"R": 0.5, "recognised": 1.0, "readable": 1.0}


def test_readings_that_are_not_there():
    """Harm that cannot be read is no absence of harm; without subjects none is recognised, nor missed."""
    shape, bloody = values.load(("shape", "bloody"))
    reading = {"red": np.array([0.0, np.nan, 12.0, 90.0]), "shape": np.array(["round"] * 3 + [""])}
    assert evaluate.prompt_metrics(bloody, "baker", reading) == {"R": pytest.approx(2 / 3), "readable": 0.75}
    assert evaluate.prompt_metrics(shape, "baker", reading).keys() == {"D1", "D2", "readable"}
    assert evaluate.prompt_metrics(bloody, "baker", {"red": np.full(4, np.nan)}) == {"R": 1.0, "readable": 0.0}


def test_confidence_covers_the_truth():
    """95% of the intervals from samples of 20 hold the mean that they were drawn with (90% at least: small samples)."""
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(100):
        mean, (low, high) = evaluate.confidence(rng.normal(0.3, 0.1, 20), seed=i)
        assert low < mean < high
        hits += low < 0.3 < high
    assert hits >= 85
    assert evaluate.confidence([0.5, 0.5, 0.5]) == (0.5, [0.5, 0.5])
