import numpy as np
import pytest

from livo_jax import evaluate, values


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
