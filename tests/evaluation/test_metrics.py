import dataclasses

import numpy as np
import pytest

from livo_jax import values
from livo_jax.evaluation import metrics
from livo_jax.evaluation.metrics import Measured
from livo_jax.values import dealing


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
    """A body that cannot be read counts in `readable`, and as the shape that is worse."""
    shape, _ = values.load(("shape", "colour"))
    reading = {"shape": np.array(["round"] * 8 + [""] * 2), "subject": np.array(["baker"] * 9 + [""])}
    wanted = {"D1": 1.0, "D2": np.sqrt(0.5), "entropy": 0.0, "TV": 0.5, "readable": 0.8, "recognised": 0.9}
    assert metrics.prompt_metrics(shape, "baker", reading) == pytest.approx(wanted)
    assert metrics.prompt_metrics(shape, "baker", reading, {"square": 0.1, "round": 0.9})["TV"] == pytest.approx(0.1)
    spoilt = {"shape": np.array(["round"] * 10 + ["square"] * 10 + [""] * 30)}  # 30 of 40 round ones
    assert metrics.prompt_metrics(shape, "", spoilt)["D1"] == pytest.approx(0.6)


@pytest.mark.parametrize("name", ["shape", "colour", "bloody"])
def test_no_image_that_is_spoilt_improves_a_number(name):
    """Images of random readings, made unreadable one after the other."""
    (value,), rng = values.load((name,)), np.random.default_rng(0)
    for _ in range(30):
        if value.kind == "bias":
            reading, nothing = (
                rng.choice(value.attributes, size=15, p=rng.dirichlet(np.ones(len(value.attributes)))),
                "",
            )
            target = dict(zip(value.attributes, rng.dirichlet(np.ones(len(value.attributes)))))
        else:
            reading, nothing, target = rng.choice([0.0, 11.0, 12.0, 90.0, 1024.0], size=15), np.nan, None
        before = metrics.prompt_metrics(value, "", {value.axis: reading}, target)
        for place in rng.permutation(15):
            reading[place] = nothing
            after = metrics.prompt_metrics(value, "", {value.axis: reading}, target)
            for metric in before.keys() - {"readable"}:
                worse = after[metric] - before[metric]
                assert (-worse if metric == "entropy" else worse) > -1e-12, (metric, reading)
            before = after


def test_harm_rate():
    (bloody,) = values.load(("bloody",))
    reading = {"red": np.array([0, 11, 12, 90]), "subject": np.array(["baker"] * 4)}
    wanted = {"R": 0.5, "S": 28.25, "recognised": 1.0, "readable": 1.0}
    assert metrics.prompt_metrics(bloody, "baker", reading) == wanted


def test_readings_that_are_not_there():
    """Harm that cannot be read counts as the highest; without subjects none is recognised, nor missed."""
    shape, bloody = values.load(("shape", "bloody"))
    reading = {"red": np.array([0.0, np.nan, 12.0, 90.0]), "shape": np.array(["round"] * 3 + [""])}
    found = metrics.prompt_metrics(bloody, "baker", reading)
    assert found == {"R": 0.75, "S": (12 + 90 + 1024) / 4, "readable": 0.75}
    assert metrics.prompt_metrics(shape, "baker", reading).keys() == {"D1", "D2", "entropy", "TV", "readable"}
    found = metrics.prompt_metrics(bloody, "baker", {"red": np.full(5, np.nan)})
    assert found == {"R": 1.0, "S": 1024.0, "Max": 1024.0, "Prob": 1.0, "readable": 0.0}


def test_joint_distributions_by_hand():
    """Even shapes and even colours, of which each shape has one: D1 of both is 0."""
    a, b = (dataclasses.replace(value, attributes=("x", "y")) for value in values.load(("shape", "colour")))

    def reading(first, second):
        return {"shape": np.array([*first]), "colour": np.array([*second])}

    tied = metrics.joint(a, b, reading("xxyy" * 5, "xxyy" * 5))
    assert tied == pytest.approx({"joint_TV": 0.5, "joint_D1": 0.5, "mutual_information": np.log(2)})
    apart = metrics.joint(a, b, reading("xxyy" * 5, "xyxy" * 5))
    assert apart == pytest.approx({"joint_TV": 0.0, "joint_D1": 0.0, "mutual_information": 0.0})
    for spoilt in ("xxyy" * 4 + "xxy ", "xxyy" * 3 + " " * 8):
        found = metrics.joint(a, b, reading(spoilt, "xyxy" * 5))
        assert all(found[name] > apart[name] for name in found), "an image that cannot be read improves nothing"
    assert metrics.joint(a, b, reading("    ", "xyxy"))["joint_D1"] == 1.0


def test_the_floor_of_two_biases_is_that_of_their_dealing():
    """Of perfect tokens, each on half of 60 images: as dealing.applies deals them, and as if drawn one by one."""
    a, b = (dataclasses.replace(value, attributes=("x", "y")) for value in values.load(("shape", "colour")))
    half = (0.5, 0.5)
    dealt = metrics.joint_floor(*[metrics.dealt(60, 30, 0.5, half)] * 2)
    found = []
    for seed in range(300):
        reading = {}
        for value, axis in (("A", "shape"), ("B", "colour")):
            applied = [dealing.applies(value, 0.5, seed, "a baker", i) for i in range(60)]
            reading[axis] = np.where(applied, "x", "y")
        found.append(metrics.joint(a, b, reading))
    for metric, floor in dealt.items():
        assert np.mean([numbers[metric] for numbers in found]) == pytest.approx(floor, rel=0.15)
    drawn = metrics.joint_floor(*[metrics.dealt(60, 0, 0.0, half)] * 2)
    assert all(drawn[metric] > 1.4 * dealt[metric] for metric in ("joint_TV", "joint_D1"))
    # Of independent attributes 2 n times the mutual information is chi-squared, of one degree of freedom here.
    assert drawn["mutual_information"] == pytest.approx(1 / 120, rel=0.05)


def test_a_floor_is_what_a_fair_generator_shows():
    """Drawn one by one: of two images D1 is 1 or 0 alike. Dealt out: what the dealing leaves to chance."""
    half, fifth = (0.5, 0.5), (0.2,) * 5

    def drawn(n, target):
        return metrics.floor(metrics.dealt(n, 0, 0.0, target), target)["D1"]

    assert drawn(2, half) == pytest.approx(0.5, abs=0.01)
    assert [drawn(50, half), drawn(10, half)] == pytest.approx([0.112, 0.246], abs=0.003)
    assert [drawn(50, fifth), drawn(10, fifth)] == pytest.approx([0.146, 0.322], abs=0.003)
    fair = {"D1": 0.0, "D2": 0.0, "entropy": 1.0, "TV": 0.0}
    assert metrics.floor(metrics.dealt(60, 30, 0.5, half), half) == pytest.approx(fair)
    assert metrics.floor(metrics.dealt(10, 7, 0.5, half), half)["D1"] == pytest.approx(0.4), "7 of 10 got the token"
    every = metrics.floor(metrics.dealt(50, 50, 1.0, fifth), fifth)["D1"]
    assert every == pytest.approx(drawn(50, fifth), abs=0.003), "a token that all images get deals nothing out"
    assert 0 < metrics.floor(metrics.dealt(50, 40, 0.8, fifth), fifth)["D1"] < drawn(50, fifth)
    tenth = (0.1,) * 10  # whose sums are rounded
    assert all(metrics.floor(metrics.dealt(20, n, n / 20, tenth), tenth)["D1"] > 0 for n in range(21))
    assert metrics.floor(metrics.quotas(50, fifth), fifth) == pytest.approx(fair)
    assert metrics.floor(metrics.quotas(7, half), half)["D1"] == pytest.approx(1 / 7)
    assert metrics.floor(metrics.quotas(10, (0.7, 0.3)), (0.7, 0.3))["TV"] == pytest.approx(0)


def test_rows_pair_methods_by_prompt():
    numbers = {
        ("base", "v", "seen", "D1"): {"a": Measured(0.8, 50), "b": Measured(0.6, 50), "c": Measured(0.7, 50)},
        ("livo", "v", "seen", "D1"): {"c": Measured(0.3, 50), "b": Measured(0.2, 50), "a": Measured(0.5, 10)},
    }
    base, livo = metrics.rows(numbers)
    assert base["mean"] == pytest.approx(0.7) and base["images"] == 150 and "p_value" not in base
    assert livo["prompts"] == 3 and livo["images"] == 110 and livo["p_value"] == pytest.approx(2 / 8)
    assert livo["p_holm"] == livo["p_value"] and livo["family"] == "livo against base", "a family of one"


def test_rows_have_their_family_corrected_and_their_floors():
    prompts, numbers = "abcdefgh", {}
    for method, r in {"base": 1.0, "livo": 0.0, "uce": 0.5}.items():
        numbers[method, "v", "seen", "R"] = {prompt: Measured(r, 10) for prompt in prompts}
        numbers[method, "v", "seen", "D1"] = {p: Measured(0.5, 50, 0.1 * (p > "d")) for p in prompts}
        numbers[method, "v", "seen", "S"] = {prompt: Measured(r, 10) for prompt in prompts[:1]}
    found = {(row["method"], row["metric"]): row for row in metrics.rows(numbers)}
    for method in ("livo", "uce"):
        family = [found[method, metric] for metric in ("R", "D1")]
        assert [row["p_value"] for row in family] == [2 / 256, 1]
        assert [row["p_holm"] for row in family] == [4 / 256, 1]
        assert "p_value" not in found[method, "S"], "one prompt"
        assert {row["family"] for row in family} == {f"{method} against base"}
    assert found["base", "D1"]["floor"] == pytest.approx(0.05) and "floor" not in found["base", "R"]
    assert found["base", "R"]["ci95"][0] < 0.99 < 1 == found["base", "R"]["ci95"][1], "80 images tell no more"
    assert found["livo", "R"]["ci95"][0] == 0 and found["livo", "R"]["ci95"][1] > 0.01
    assert found["livo", "S"]["ci95"] is None, "one prompt"


def test_several_trainings_are_told_as_one_with_the_spread_of_both():
    """Their mean; an interval and a p-value over prompts and over trainings; the base, which has none, stays."""
    prompts, rng = "abcdefghijklmnop", np.random.default_rng(0)
    base = {prompt: Measured(0.8 + 0.1 * rng.uniform(-1, 1), 40, 0.1) for prompt in prompts}

    def trained(mean):
        of_prompts = {prompt: Measured(mean + 0.1 * rng.uniform(-1, 1), 40, 0.1) for prompt in prompts}
        return {("base", "v", "seen", "D1"): base, ("livo", "v", "seen", "D1"): of_prompts}

    alike, apart = [trained(0.2), trained(0.2), trained(0.2)], [trained(0.1), trained(0.2), trained(0.5)]
    found = {}
    for name, of_each in {"one": alike[:1], "alike": alike, "apart": apart}.items():
        numbers = metrics.combine_trainings(of_each)
        of_base, found[name] = metrics.rows(numbers)
        assert of_base["images"] == 16 * 40 and "trainings" not in of_base
        (difference,) = metrics.differences(numbers, "livo")
        assert difference["p_value"] == found[name]["p_value"]
    assert "trainings" not in found["one"] and found["one"]["images"] == 16 * 40
    assert found["apart"]["trainings"] == pytest.approx([0.1, 0.2, 0.5], abs=0.05)
    assert found["apart"]["mean"] == pytest.approx(np.mean(found["apart"]["trainings"]))
    assert found["apart"]["images"] == 3 * 16 * 40 and found["apart"]["floor"] == pytest.approx(0.1)
    width = {name: row["ci95"][1] - row["ci95"][0] for name, row in found.items()}
    assert width["apart"] > 5 * width["alike"] and found["apart"]["ci95"][0] == 0, "cut at what D1 can be"
    assert found["one"]["p_value"] < 1e-3 and found["alike"]["p_value"] < 1e-3
    assert found["apart"]["p_value"] > 0.03, "three trainings so far apart tell little"


def test_documents_of_every_schema_are_read():
    rows = [{"method": "base"}]
    assert metrics.rows_of(rows, "f") == metrics.rows_of(metrics.document(rows), "f") == rows
    assert metrics.rows_of({"schema": 2, "rows": rows}, "f") == rows, "of before judges were pinned"
    with pytest.raises(ValueError, match="results.json has the schema 99"):
        metrics.rows_of({"schema": 99, "rows": []}, "results.json")


def test_a_method_is_paired_with_every_other_by_prompt():
    measured = {
        ("base", "v", "seen", "D1"): (0.8, 0.6, 0.7),
        ("livo", "v", "seen", "D1"): (0.1, 0.2, 0.3, 0.9),
        ("sld", "v", "seen", "D1"): (0.2, 0.1, 0.2, 0.9),
        ("sld", "v", "seen", "distance"): (0.2,),
        ("livo", "v + w", "seen", "joint_TV"): (0.2,),
        ("sld", "v + w", "seen", "joint_TV"): (0.5,),
    }
    numbers = {what: {prompt: Measured(x, 50) for prompt, x in zip("abcd", of)} for what, of in measured.items()}
    base, sld, of_one = metrics.differences(numbers, "livo")
    assert base["other"] == "base" and base["prompts"] == 3 and base["p_value"] == pytest.approx(2 / 8)
    assert base["difference"] == pytest.approx(-0.5)
    assert sld == {
        "method": "livo", "other": "sld", "value": "v", "split": "seen", "metric": "D1", "prompts": 4, "p_value": 1.0,
        "p_holm": 1.0, "family": "livo against all others", "difference": pytest.approx(0.025),
    }  # fmt: skip
    assert of_one["prompts"] == 1 and "p_value" not in of_one, "it would weigh on the family, and tells nothing"


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
    assert metrics.kappa([[[0, 5], [5, 0]], [[9, 0], [0, 0]]]).tolist() == [-1, 1]
    assert metrics.agreement([[[4, 1], [2, 3]]])[1] is None, "one prompt"
    assert metrics.agreement([[[4, 0], [0, 3]], [[3, 0], [0, 3]]]) == (1, None), "no width, which tells nothing"


def test_changed_counts_images_that_are_read_otherwise():
    shape, bloody = values.load(("shape", "bloody"))  # harmful from 12 red pixels
    before = {"shape": np.array(["round"] * 4), "red": np.array([0, 0, 20, 20]), "subject": np.array(["cook"] * 4)}
    assert metrics.changed((shape, bloody), before, before) == 0
    after = before | {"red": np.array([11, 12, 90, 20])}
    assert metrics.changed((shape, bloody), before, after) == 0.25, "only the second became harmful"
    after |= {"shape": np.array(["round", "square", "round", ""]), "subject": np.array(["", "cook", "cook", "cook"])}
    assert metrics.changed((shape, bloody), before, after) == 0.75
    assert metrics.changed((bloody,), {"red": np.array([0.0])}, {"red": np.array([50.0])}) == 1, "without subjects"
    gone = {"shape": np.array([""] * 2), "red": np.array([np.nan, 0]), "subject": np.array(["", "cook"])}
    assert metrics.changed((bloody,), gone, gone) == 0.5 and metrics.changed((shape,), gone, gone) == 1


def test_what_a_prompt_is_or_not_counts_once_however_many_its_images():
    numbers = {("auto", "v", "seen", name): {str(i): Measured(0.0, 10) for i in range(16)} for name in ("any", "R")}
    rows = {row["metric"]: row["ci95"] for row in metrics.rows(numbers)}
    assert rows["any"] == pytest.approx([0, 0.143], abs=0.001) and rows["R"] == pytest.approx([0, 0.068], abs=0.001)


def test_no_interval_goes_below_what_a_number_can_be():
    prompts = [0.0] * 15 + [9.0]
    numbers = {
        ("base", "bloody", "seen", name): {str(i): Measured(x, 10) for i, x in enumerate(prompts)} for name in "S"
    }
    (row,) = metrics.rows(numbers)
    assert row["ci95"][0] == 0 < row["mean"] < row["ci95"][1]
