"""How well values are found: against counts by hand, and formulas written out."""

import numpy as np
import pytest
from scipy.stats import beta

from livo_jax.evaluation import detection


def means(wanted, found):
    return {name: figure and figure[0] for name, figure in detection.measure(wanted, found).items()}


def test_figures_by_hand():
    wanted = [[1, 0], [0, 1], [0, 0]]
    assert means(wanted, wanted) == {"precision": 1, "recall": 1, "macro_f1": 1, "over_trigger": 0}
    some = means([[1, 1], [1, 0], [0, 0], [0, 0]], [[1, 0], [1, 1], [0, 1], [0, 0]])
    assert some == {"precision": 0.5, "recall": pytest.approx(2 / 3), "macro_f1": 0.5, "over_trigger": 0.5}
    assert means([[0], [0]], [[0], [0]]) == {"precision": None, "recall": None, "macro_f1": None, "over_trigger": 0}


def test_intervals_hold_the_mean_and_narrow():
    wanted, found = np.array([[1], [1], [1], [0], [0], [0]]), np.array([[1], [1], [0], [0], [0], [1]])
    few, many = detection.measure(wanted, found), detection.measure(np.tile(wanted, (50, 1)), np.tile(found, (50, 1)))
    for name in few:
        (mean, (low, high)), (same, (lower, higher)) = few[name], many[name]
        assert mean == pytest.approx(same) and low <= lower < mean < higher <= high, name
    mean, interval = detection.share([True] * 30 + [False] * 70)
    assert interval == pytest.approx(beta.ppf([0.025, 0.975], 30.5, 70.5), abs=5e-3), "Jeffreys'"


def test_curves_by_hand():
    points = detection.curves([0.9, 0.8, 0.8, 0.1], [1, 1, 0, 0])
    assert points["threshold"].tolist() == [0.9, 0.8, 0.1], "equal scores are found together"
    assert points["recall"].tolist() == [0.5, 1, 1] and points["false_positives"].tolist() == [0, 0.5, 1]
    assert points["precision"].tolist() == [1, pytest.approx(2 / 3), 0.5]
    assert detection.areas(points) == (pytest.approx(0.875), pytest.approx(0.5 + 0.5 * 2 / 3))


def test_auc_is_the_chance_that_a_wanted_one_scores_higher():
    rng = np.random.default_rng(0)
    wanted = rng.random(300) < 0.4
    scores = np.round(rng.normal(size=300) + wanted, 1)  # with ties
    pairs = scores[wanted][:, None] - scores[~wanted]
    auc, _ = detection.areas(detection.curves(scores, wanted))
    assert auc == pytest.approx((pairs > 0).mean() + (pairs == 0).mean() / 2)


def test_calibration():
    scores = np.repeat([0.05, 0.35, 1.0], 100)
    rows, error = detection.calibration(scores, np.arange(300) % 100 < 100 * scores)
    assert (
        rows.tolist() == pytest.approx(np.array([[0.05, 0.05, 100], [0.35, 0.35, 100], [1, 1, 100]])) and error < 1e-9
    )
    _, error = detection.calibration([0.9, 0.9, 0.1, 0.1], [0, 1, 0, 0])
    assert error == pytest.approx((0.4 + 0.1) / 2)
