import dataclasses

import numpy as np
import pytest

from livo_jax import metrics, values


def test_discrepancies_by_hand():
    assert metrics.discrepancy([25, 25]) == (0.0, 0.0)
    d1, d2 = metrics.discrepancy([40, 10])
    assert d1 == pytest.approx(0.6) and d2 == pytest.approx(np.sqrt(2 * 0.3**2))
    d1, d2 = metrics.discrepancy([50, 0, 0, 0, 0])
    assert d1 == 1.0 and d2 == pytest.approx(np.sqrt(0.8**2 + 4 * 0.2**2))
    assert metrics.discrepancy([0, 0]) == metrics.discrepancy([7, 0]), "nothing can be read: the worst"


def test_entropy_and_total_variation_by_hand():
    assert metrics.entropy([7, 7, 7]) == pytest.approx(1.0)
    assert metrics.entropy([9, 0]) == metrics.entropy([0, 0]) == 0.0
    assert metrics.entropy([1, 3]) == pytest.approx(2 - 0.75 * np.log2(3))
    assert metrics.total_variation([40, 10]) == pytest.approx(0.3), "15 of 50 would have to change"
    assert metrics.total_variation([7, 3], [0.7, 0.3]) == 0.0
    assert metrics.total_variation([0, 0], [0.7, 0.3]) == pytest.approx(0.7), "nothing can be read: the worst"


def test_harm_by_hand():
    """Two groups of five, and an image over that counts in R and S alone."""
    scores = [0.9, 0, 0, 0, 0, 0.1, 0.2, 0, 0, 0, 1.0]
    assert metrics.harm(scores, 0.5) == pytest.approx({"R": 2 / 11, "S": 0.2, "Max": 0.55, "Prob": 0.5})
    assert metrics.harm([1.0, 0.0], 0.5) == {"R": 0.5, "S": 0.5}


def test_spoilt_pictures_do_not_look_fair():
    """A body that cannot be read counts in `readable`, and leaves D1 as it was."""
    shape, _ = values.load(("shape", "colour"))
    reading = {"shape": np.array(["round"] * 8 + [""] * 2), "subject": np.array(["baker"] * 9 + [""])}
    wanted = {"D1": 1.0, "D2": np.sqrt(0.5), "entropy": 0.0, "TV": 0.5, "readable": 0.8, "recognised": 0.9}
    assert metrics.prompt_metrics(shape, "baker", reading) == pytest.approx(wanted)
    assert metrics.prompt_metrics(shape, "baker", reading, {"square": 0.1, "round": 0.9})["TV"] == pytest.approx(0.1)


def test_harm_rate():
    (bloody,) = values.load(("bloody",))
    reading = {"red": np.array([0, 11, 12, 90]), "subject": np.array(["baker"] * 4)}
    wanted = {"R": 0.5, "S": 28.25, "recognised": 1.0, "readable": 1.0}
    assert metrics.prompt_metrics(bloody, "baker", reading) == wanted


def test_readings_that_are_not_there():
    """Harm that cannot be read is no absence of harm; without subjects none is recognised, nor missed."""
    shape, bloody = values.load(("shape", "bloody"))
    reading = {"red": np.array([0.0, np.nan, 12.0, 90.0]), "shape": np.array(["round"] * 3 + [""])}
    found = metrics.prompt_metrics(bloody, "baker", reading)
    assert found == {"R": pytest.approx(2 / 3), "S": 34.0, "readable": 0.75}
    assert metrics.prompt_metrics(shape, "baker", reading).keys() == {"D1", "D2", "entropy", "TV", "readable"}
    found = metrics.prompt_metrics(bloody, "baker", {"red": np.full(5, np.nan)})
    assert found == {"R": 1.0, "S": 12.0, "Max": 12.0, "Prob": 1.0, "readable": 0.0}


def test_joint_distributions_by_hand():
    """Even shapes and even colours, of which each shape has one: D1 of both is 0."""
    a, b = (dataclasses.replace(value, attributes=("x", "y")) for value in values.load(("shape", "colour")))
    reading = lambda first, second: {"shape": np.array([*first]), "colour": np.array([*second])}
    tied = metrics.joint(a, b, reading("xxyy" * 5, "xxyy" * 5))
    assert tied == pytest.approx({"joint_TV": 0.5, "joint_D1": 0.5, "mutual_information": np.log(2)})
    apart = metrics.joint(a, b, reading("xxyy" * 5, "xyxy" * 5))
    assert apart == pytest.approx({"joint_TV": 0.0, "joint_D1": 0.0, "mutual_information": 0.0})
    for spoilt in ("xxyy" * 4 + "xxy ", "xxyy" * 3 + " " * 8):
        found = metrics.joint(a, b, reading(spoilt, "xyxy" * 5))
        assert all(found[name] > apart[name] for name in found), "an image that cannot be read improves nothing"
    assert metrics.joint(a, b, reading("    ", "xyxy"))["joint_D1"] == 1.0


def test_confidence_covers_the_truth():
    """95% of the intervals from samples of 20 hold the mean that they were drawn with (90% at least: small samples)."""
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(100):
        mean, (low, high) = metrics.confidence(rng.normal(0.3, 0.1, 20), seed=i)
        assert low < mean < high
        hits += low < 0.3 < high
    assert hits >= 85
    assert metrics.confidence([0.5, 0.5, 0.5]) == (0.5, [0.5, 0.5])


def test_significance():
    """Exact for four prompts, where only the signs as they are and all of them reversed are as extreme."""
    assert metrics.significance([1.0, 2.0, 3.0, 4.0], [0.0] * 4) == pytest.approx(2 / 16)
    assert metrics.significance([0.5, 0.5], [0.5, 0.5]) == metrics.significance([1.0], [0.5]) == 1.0
    rng = np.random.default_rng(0)
    base = rng.normal(0.7, 0.2, 30)  # prompts differ far more than the methods do
    assert metrics.significance(base - 0.05 + rng.normal(0, 0.02, 30), base) < 0.001
    by_chance = [metrics.significance(base + rng.normal(0, 0.1, 30), base, seed) < 0.05 for seed in range(60)]
    assert sum(by_chance) <= 8, "where there is no difference one in twenty is found"


def test_rows_pair_methods_by_prompt():
    numbers = {
        ("base", "v", "seen", "D1"): {"a": (0.8, 50), "b": (0.6, 50), "c": (0.7, 50)},
        ("livo", "v", "seen", "D1"): {"c": (0.3, 50), "b": (0.2, 50), "a": (0.5, 10)},
    }
    base, livo = metrics.rows(numbers)
    assert base["mean"] == pytest.approx(0.7) and base["images"] == 150 and "p_value" not in base
    assert livo["prompts"] == 3 and livo["images"] == 110 and livo["p_value"] == pytest.approx(2 / 8)


def test_a_method_is_paired_with_every_other_by_prompt():
    of = lambda *numbers: dict(zip("abcd", ((x, 50) for x in numbers)))
    numbers = {
        ("base", "v", "seen", "D1"): of(0.8, 0.6, 0.7),
        ("livo", "v", "seen", "D1"): of(0.1, 0.2, 0.3, 0.9),
        ("sld", "v", "seen", "D1"): of(0.2, 0.1, 0.2, 0.9),
        ("sld", "v", "seen", "distance"): of(0.2),
    }
    base, sld = metrics.differences(numbers, "livo")
    assert base["other"] == "base" and base["prompts"] == 3 and base["p_value"] == pytest.approx(2 / 8)
    assert base["difference"] == pytest.approx(-0.5)
    assert sld == {
        "method": "livo", "other": "sld", "value": "v", "split": "seen", "metric": "D1", "prompts": 4, "p_value": 1.0,
        "difference": pytest.approx(0.025),
    }  # fmt: skip


def test_kappa_by_hand():
    """Cohen's example: 0.7 agreement, 0.5 by chance."""
    a = ["yes"] * 25 + ["no"] * 25
    b = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    confusion = metrics.confusion(a, b, ("yes", "no"))
    assert confusion.tolist() == [[20, 5], [10, 15]]
    assert metrics.kappa(confusion) == pytest.approx(0.4)
    assert metrics.kappa([[0, 5], [5, 0]]) == pytest.approx(-1.0)
    assert metrics.kappa([[9, 0], [0, 0]]) == 1.0
    kappa, (low, high) = metrics.agreement([[[4, 1], [2, 3]], [[3, 1], [3, 3]], [[5, 0], [1, 4]]])
    assert low < kappa < high and kappa == pytest.approx(metrics.kappa([[12, 2], [6, 10]]))


def test_changed_counts_images_that_are_read_otherwise():
    shape, bloody = values.load(("shape", "bloody"))  # harmful from 12 red pixels
    before = {"shape": np.array(["round"] * 4), "red": np.array([0, 0, 20, 20]), "subject": np.array(["cook"] * 4)}
    assert metrics.changed((shape, bloody), before, before) == 0
    after = before | {"red": np.array([11, 12, 90, 20])}
    assert metrics.changed((shape, bloody), before, after) == 0.25, "only the second became harmful"
    after |= {"shape": np.array(["round", "square", "round", ""]), "subject": np.array(["", "cook", "cook", "cook"])}
    assert metrics.changed((shape, bloody), before, after) == 0.75
    assert metrics.changed((bloody,), {"red": np.array([0.0])}, {"red": np.array([50.0])}) == 1, "without subjects"
