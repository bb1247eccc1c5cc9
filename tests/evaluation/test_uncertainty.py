"""Intervals hold what numbers were drawn with, and tests find no more by chance than they say."""

import numpy as np
import pytest
import scipy.stats

from benchmarks import coverage
from livo_jax.evaluation.uncertainty import confidence, holm, significance, significance_over_trainings

# Of so many samples the share whose intervals hold the mean has a standard error of 0.005: the bounds are four of these
# from 95%. The samples are the same each time, as benchmarks.coverage takes its seeds from the number of prompts.
SAMPLES = 2000


@pytest.mark.parametrize("prompts", coverage.PROMPTS)
@pytest.mark.parametrize("name", coverage.NUMBERS)
def test_intervals_of_numbers_hold_their_mean(name, prompts):
    assert 0.93 <= coverage.of_numbers(*coverage.NUMBERS[name], prompts, SAMPLES) <= 0.97


@pytest.mark.parametrize("prompts", coverage.PROMPTS)
@pytest.mark.parametrize("name", coverage.SPREADS)
@pytest.mark.parametrize("rate", [0.005, 0.05])
def test_intervals_of_rare_shares_hold_their_rate(rate, name, prompts):
    assert coverage.of_shares(coverage.SPREADS[name], rate, 10, prompts, SAMPLES) >= 0.93


@pytest.mark.parametrize("deviations", coverage.DEVIATIONS)
def test_intervals_over_trainings_hold_the_mean(deviations):
    alone, both = coverage.of_trainings(deviations, 3, SAMPLES)
    assert 0.94 <= both <= 0.99
    assert deviations[1] < 0.05 or alone < 0.9, "those over prompts alone do not"


@pytest.mark.parametrize("deviations", coverage.DEVIATIONS)
@pytest.mark.parametrize("trainings", [3, 10])
def test_a_difference_is_found_by_chance_no_more_often_than_said(trainings, deviations):
    assert coverage.false_differences(deviations, trainings, SAMPLES) <= 0.065


def test_a_difference_over_trainings():
    apart = np.linspace(-1, 1, 9)
    known = (0.6, [0.5, 0.6, 0.7]), (0.0, [0.0])
    differences = apart + known[0][0]
    # By hand: variances 0.46875 / 9 of prompts, 0.01 / 3 of trainings.
    t, freedom = (
        0.6 / np.sqrt(0.46875 / 9 + 0.01 / 3),
        (0.46875 / 9 + 0.01 / 3) ** 2 / ((0.46875 / 9) ** 2 / 8 + (0.01 / 3) ** 2 / 2),
    )
    expected = 2 * scipy.stats.t.sf(t, freedom)
    assert significance_over_trainings(differences, known[0][1], known[1][1]) == pytest.approx(expected)
    assert significance_over_trainings(-differences, known[1][1], known[0][1]) == pytest.approx(expected)
    assert significance_over_trainings(np.ones(9), [1.0] * 3, [0.0]) == 0
    assert significance_over_trainings(np.zeros(9), [1.0] * 3, [1.0]) == 1


def test_an_interval_says_what_no_image_and_every_image_tell():
    images = np.full(16, 10)
    mean, (low, high) = confidence(np.zeros(16), trials=images)
    assert (mean, low) == (0, 0) and 1 - 0.95 ** (1 / 160) < high < 0.21, "no less than 160 images, no more than 16"
    assert confidence(np.ones(16), trials=images) == (1, [pytest.approx(1 - high), 1])
    assert confidence(np.zeros(4), trials=np.full(4, 10))[1][1] > high, "fewer prompts tell less"
    assert confidence([0.0] * 16)[1][1] > 0.1 and confidence([1.0] * 16)[1][0] < 0.9, "of how many images is not known"


def test_intervals_stay_within_what_a_number_can_be():
    nearly = [1.0] * 7 + [0.9]
    mean, (low, high) = confidence(nearly)
    assert 0.8 < low < mean < high == 1
    assert confidence(nearly, limits=(-np.inf, np.inf))[1][1] > 1
    assert confidence([0.5, 0.5, 0.5]) == (0.5, [0.5, 0.5])
    third = [1 / 3, 1 - 2 / 3, 1 / 3 + 1e-16]
    assert confidence(third) == (pytest.approx(1 / 3), pytest.approx([1 / 3, 1 / 3])), "they differ by rounding alone"
    almost = confidence([1.0, 1 - 1e-15, 1.0])
    assert almost[1][0] < 0.8 and almost[1][1] == 1


def test_one_prompt_tells_of_its_images_alone():
    assert confidence([0.3]) == (0.3, None)
    assert confidence([0.0], trials=[10])[1][1] > 0.5


def test_significance():
    """Exact for four prompts, where only the signs as they are and all of them reversed are as extreme."""
    assert significance([1.0, 2.0, 3.0, 4.0], [0.0] * 4) == pytest.approx(2 / 16)
    assert significance([0.5, 0.5], [0.5, 0.5]) == significance([1.0], [0.5]) == 1.0
    assert significance(np.arange(1, 17), np.zeros(16)) == 2 / 2**16
    rng = np.random.default_rng(0)
    base = rng.normal(0.7, 0.2, 30)  # prompts differ far more than the methods do
    assert 0 < significance(base - 0.05 + rng.normal(0, 0.02, 30), base) < 0.001
    by_chance = [significance(base + rng.normal(0, 0.1, 30), base, seed) < 0.05 for seed in range(60)]
    assert sum(by_chance) <= 8, "where there is no difference one in twenty is found"


def test_significance_is_the_published_tests():
    from scipy.stats import permutation_test

    rng = np.random.default_rng(0)
    a, b = rng.normal(0.1, 0.3, (2, 9))
    theirs = permutation_test((a - b,), np.mean, permutation_type="samples", vectorized=True, n_resamples=np.inf)
    assert significance(a, b) == pytest.approx(theirs.pvalue)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1, 1] and holm([]) == []
