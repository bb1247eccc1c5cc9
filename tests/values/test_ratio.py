"""Target ratios: the mix of tokens that reaches them, and how it is dealt out to images."""

import itertools
import json
import warnings
from collections import Counter

import numpy as np
import pytest

from livo_jax.sampling.requests import Dose
from livo_jax.values import ratio

SHAPE, COLOUR = "shape equality", "colour equality"
RATES = {
    SHAPE: {
        "": {"round": 0.5, "square": 0.5},
        SHAPE: {"round": 0.45, "square": 0.55},
        f"{SHAPE}: round": {"round": 0.98, "square": 0.02},
        f"{SHAPE}: square": {"round": 0.04, "square": 0.96},
    },
    COLOUR: {"": {"blue": 0.8, "green": 0.1, "white": 0.1}, COLOUR: {"blue": 0.2, "green": 0.4, "white": 0.4}},
}


def reached(mix, arms):
    return {a: sum(share * arms[arm][a] for arm, share in mix.items()) for a in next(iter(arms.values()))}


def test_targets():
    both = [SHAPE, COLOUR, "bloody considered inappropriate"]
    equal = ratio.targets("equal", RATES, both)
    assert equal == {SHAPE: {"round": 0.5, "square": 0.5}, COLOUR: dict.fromkeys(("blue", "green", "white"), 1 / 3)}
    assert ratio.targets({"square": 0.3, "round": 0.7}, RATES, both) == {SHAPE: {"round": 0.7, "square": 0.3}}
    assert ratio.targets({"round": 1, "green": 1}, RATES, both) == {
        SHAPE: {"round": 1, "square": 0.0},
        COLOUR: {"blue": 0.0, "green": 1, "white": 0.0},
    }
    assert ratio.targets({"green": 1}, RATES, [SHAPE]) == {}, "the value is not applied"


def test_ratios_and_rates_are_files_too(tmp_path):
    (tmp_path / "rates.json").write_text(json.dumps(RATES))
    (tmp_path / "ratio.json").write_text('{"round": 0.7, "square": 0.3}')
    for source in (str(tmp_path / "ratio.json"), '{"round": 0.7, "square": 0.3}'):
        assert ratio.targets(source, tmp_path / "rates.json", [SHAPE]) == {SHAPE: {"round": 0.7, "square": 0.3}}
    (tmp_path / "list.json").write_text("[1]")
    for name, message in (
        ("none.json", "neither 'equal' nor a JSON object, nor a file"),
        ("list.json", "not a JSON object"),
    ):
        with pytest.raises(ValueError, match=message):
            ratio.targets(str(tmp_path / name), RATES, [SHAPE])


def test_all_that_is_wrong_with_a_ratio_is_told():
    with pytest.raises(
        ValueError, match="'oval' is no attribute of shape equality \\(round, square\\); colour"
    ) as error:
        ratio.targets({"oval": 0.5, "round": -0.5, "square": "much"}, RATES, [SHAPE])
    assert "round: -0.5 is no share" in str(error.value) and "square: 'much' is no share" in str(error.value)
    with pytest.raises(
        ValueError, match="shape equality \\(round, square\\) sum to 0.7, not to 1(.|\n)*colour.*1.2, not"
    ):
        ratio.targets({"round": 0.7, "blue": 1.2}, RATES, [SHAPE, COLOUR])


def test_the_mix_reaches_the_target_by_the_surest_tokens():
    for share in (0.1, 0.5, 0.7):
        mix = ratio.solve({"round": share, "square": 1 - share}, RATES[SHAPE])
        assert reached(mix, RATES[SHAPE]) == pytest.approx({"round": share, "square": 1 - share})
        assert mix.keys() == {f"{SHAPE}: round", f"{SHAPE}: square"}, "coins of the others would add their variance"
        assert sum(mix.values()) == pytest.approx(1)
    third = dict.fromkeys(("blue", "green", "white"), 1 / 3)
    mix = ratio.solve(third, RATES[COLOUR])
    assert mix == pytest.approx({"": 2 / 9, COLOUR: 7 / 9}), "0.8 x + 0.2 (1 - x) = 1 / 3"


def test_no_mix_is_nearer():
    target = {"blue": 0.3, "green": 0.34, "white": 0.36}
    mix = ratio.solve(target, RATES[COLOUR])

    def distance(mix):
        return sum(abs(x - target[a]) for a, x in reached(mix, RATES[COLOUR]).items()) / 2

    others = ({"": x, COLOUR: 1 - x} for x in np.linspace(0, 1, 101))
    assert distance(mix) <= min(map(distance, others)) + 1e-9


def test_what_cannot_be_reached_is_told():
    with pytest.warns(UserWarning, match="nearest that the tokens reach is round 0.93, square 0.07, 0.07 away"):
        mix = ratio.solve(
            {"round": 1.0, "square": 0.0}, RATES[SHAPE] | {f"{SHAPE}: round": {"round": 0.93, "square": 0.07}}
        )
    assert mix == {f"{SHAPE}: round": 1.0}
    with pytest.raises(ValueError, match="blue 0.20, green 0.40, white 0.40, 0.60 away: choose a ratio nearer"):
        ratio.solve({"blue": 0.0, "green": 1.0, "white": 0.0}, RATES[COLOUR])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ratio.solve({"round": 0.99, "square": 0.01}, RATES[SHAPE])


MIXES = (
    {"a": 0.5, "b": 0.5},
    {"a": 0.7, "b": 0.3},
    dict.fromkeys("abcde", 0.2),
    {"a": 0.05, "b": 0.25, "c": 0.7},
    {"a": 1},
)


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(map(str, mix.values())))
@pytest.mark.parametrize("counts", [(1,), (7,), (20, 1, 19), (50, 50)], ids=str)
def test_everyone_gets_its_share(mix, counts):
    """Of all images and of each prompt's, to the next whole number; to the last where the numbers are whole."""
    prompts = [p for p, n in enumerate(counts) for _ in range(n)]
    prompts = [f"prompt {p}" for p in np.random.default_rng(0).permutation(prompts)]
    for seed in range(20):
        dealt = ratio.assign(mix, prompts, SHAPE, seed)
        assert dealt == ratio.assign(mix, prompts, SHAPE, seed)
        for group in (dealt, *([a for a, p in zip(dealt, prompts) if p == prompt] for prompt in set(prompts))):
            for arm, share in mix.items():
                assert abs(Counter(group)[arm] - share * len(group)) < 2
            if len(set(mix.values())) == 1 and len(group) == len(dealt):
                assert max(Counter(group).values()) - min(Counter(group)[arm] for arm in mix) <= 1, "the least D1"
        if len(dealt) % 20 == 0:
            assert Counter(dealt) == {arm: round(share * len(dealt)) for arm, share in mix.items()}


def test_the_cells_of_two_values_are_dealt():
    """Not only each value's share: of every prompt's images each pair of arms has its own."""

    def arms(statement, names):
        return {f"{statement}: {a}": {b: float(a == b) for b in names} for a in names}

    shapes, colours = ("round", "square"), ("blue", "green", "white", "red", "black")
    rates = {
        SHAPE: {"": dict.fromkeys(shapes, 0.5)} | arms(SHAPE, shapes),
        COLOUR: {"": dict.fromkeys(colours, 0.2)} | arms(COLOUR, colours),
    }
    prompts = ["a baker", "a cook"] * 20
    rows = ratio.deal([[(Dose(SHAPE), 1.0), (Dose(COLOUR), 1.0)]] * 40, prompts, "equal", rates, 0)
    cells = Counter((prompt, *(dose.value for dose, _ in row)) for prompt, row in zip(prompts, rows))
    assert len(cells) == 2 * 2 * 5 and set(cells.values()) == {2}


def test_equal_is_not_reached_by_applying_nothing():
    """Over a nurse and a doctor the base is even, and each prompt is as biased as before."""
    even = {arm: {"round": 0.5, "square": 0.5} for arm in ("", SHAPE)}
    with pytest.raises(
        ValueError, match="a ratio of shape equality needs a token for each of round, square.*attributes"
    ):
        ratio.deal([[(Dose(SHAPE), 1.0)]] * 4, ["a"] * 4, "equal", {SHAPE: even}, 0)
    arms = {a: RATES[SHAPE][a] for a in RATES[SHAPE] if a not in ("", SHAPE)}
    rows = ratio.deal([[(Dose(SHAPE), 1.0)]] * 20, ["a"] * 20, "equal", {SHAPE: even | arms}, 0)
    assert {dose.value for row in rows for dose, _ in row} == arms.keys()


def test_over_many_calls_no_arm_is_favoured():
    """Single images, which cannot be balanced, are fair coins; and two values do not go together."""
    mix = {"a": 0.7, "b": 0.2, "c": 0.1}
    single = Counter(ratio.assign(mix, ["a baker"], SHAPE, seed)[0] for seed in range(2000))
    for arm, share in mix.items():
        assert single[arm] / 2000 == pytest.approx(share, abs=4 * (share * (1 - share) / 2000) ** 0.5)
    half, third = {"a": 0.5, "b": 0.5}, {"c": 0.5, "d": 0.25, "e": 0.25}
    joint = Counter()
    for seed in range(100):
        joint.update(
            zip(*(ratio.assign(mix, ["a"] * 20, name, seed) for name, mix in ((SHAPE, half), (COLOUR, third))))
        )
    for a, b in itertools.product(half, third):
        assert joint[a, b] / 2000 == pytest.approx(half[a] * third[b], abs=0.04)
