"""Which images are drawn for pairs, which of them the judge keeps, and which become pairs."""

import dataclasses
import json
from collections import Counter, defaultdict

import numpy as np
import pytest

from configs import tiny
from livo_jax import values
from livo_jax.runs import build_preferences, evaluate
from livo_jax.runs.build_preferences import (
    Candidate,
    balanced,
    candidates,
    census,
    fault,
    favoured,
    matched,
    pair,
    scenes,
)
from livo_jax.sampling.requests import Request

SHAPE, COLOUR, BLOODY = values.load(("shape", "colour", "bloody"))


@pytest.fixture
def config():
    config = tiny.get_config("smoke")
    c = config.preferences
    c.templates = c.templates[:6]  # without hats, whose colours are others' than the worker's
    c.pairs_per_scene, c.candidates_per_pair = 3, 1.5
    return config


def test_favourites_are_the_commonest():
    reading = {"shape": np.array(["round", "round", "square", "", "square", "square"])}
    config = tiny.get_config()
    config.preferences.scenes, config.preferences.census_per_scene = ("baker", "cook"), 3
    assert favoured(reading, [SHAPE, BLOODY], config) == {
        ("shape", "baker"): "round",
        ("shape", "cook"): "square",
    }
    unreadable = favoured({"shape": np.array(["round"] + [""] * 5)}, [SHAPE, BLOODY], config)
    assert unreadable == {("shape", "baker"): "round"}
    plan = candidates([SHAPE, BLOODY], config, unreadable)
    assert {(c.value.name, c.scene) for c in plan} == {("shape", "baker"), ("bloody", "baker"), ("bloody", "cook")}


def test_without_scenes_each_value_has_those_of_its_sources():
    config = tiny.get_config()
    config.preferences.scenes, config.preferences.census_per_scene = (), 1
    shape = dataclasses.replace(SHAPE, sources=("careers",))
    colour = dataclasses.replace(COLOUR, sources=("people", "careers"))
    bloody = dataclasses.replace(BLOODY, sources=("places",))
    three = (shape, colour, bloody)
    careers = scenes(shape, config)
    assert "cook" in careers and "chief" not in careers, "it is held out"
    assert scenes(colour, config)[-len(careers) :] == careers and "wife" in scenes(colour, config)
    places = census(three, config)
    assert list(places.values()) == list(range(len(places))) and set(places) == set(scenes(colour, config))
    reading = {"shape": np.array(["round"] * len(places)), "colour": np.array(["blue"] * len(places), object)}
    reading["colour"][places["wife"]] = "green"
    favourite = favoured(reading, three, config)
    assert favourite["colour", "wife"] == "green" and ("shape", "wife") not in favourite
    plan = candidates(three, config, favourite)
    for value in three:
        assert {c.scene for c in plan if c.value == value} == set(scenes(value, config))
    made_of = json.loads(json.dumps(build_preferences.made_of(config, three)))
    assert made_of["preferences"]["scenes"] == {value.name: list(scenes(value, config)) for value in three}
    with pytest.raises(ValueError, match="scenes is empty, and for the sources of shape, .*\n.*no list is named"):
        build_preferences.made_of(config, (SHAPE,))


def test_the_embedded_worlds_prompts_are_as_ever():
    """Also "a optician", which its figures were measured with; and its datasets are made of what they were."""
    config, three = tiny.get_config(), (SHAPE, COLOUR, BLOODY)
    drawn = {prompt.text for _, prompt in evaluate.plan(config, three)}
    assert {"a photo of a optician", "a photo of a bloody diver", "a photo of a cook"} <= drawn
    made_of = build_preferences.made_of(config, three)
    assert made_of["preferences"] | {"attacks": []} == json.loads(config.preferences.to_json())
    fields = "name statement kind axis wordings attributes aligned negative harmful_from keep_probability"
    for principle in made_of["principles"].values():
        assert set(principle) == {*fields.split(), "classes", "question"}, "nothing that pairs do not depend on"


def test_candidates_say_the_attribute_and_are_filed_under_the_neutral_prompt(config):
    favourite = {(v, s): a for v, a in (("shape", "round"), ("colour", "blue")) for s in config.preferences.scenes}
    plan = candidates((SHAPE, COLOUR, BLOODY), config, favourite)
    colours = [c for c in plan if c.value == COLOUR and c.scene == "cook"]
    assert [c.shows for c in colours if c.side == "violating"] == ["blue"] * 5
    others = ["green", "yellow", "white", "violet"]
    assert [c.shows for c in colours if c.side == "aligned"] == others + others[:1], "in turn"
    assert all(c.shows in c.request.prompt and c.shows not in c.prompt for c in colours)
    bloody = [c for c in plan if c.value == BLOODY]
    for aligned, violating in zip(bloody[::2], bloody[1::2]):
        assert aligned.prompt == violating.prompt == violating.request.prompt and "bloody" in aligned.prompt
        assert "bloody" not in aligned.request.prompt
        assert aligned.request.noise == violating.request.noise, "the same noise on both sides"


def test_a_template_for_two_is_of_two_such(config):
    config.preferences.templates = ("a(n) {} and a(n) {}",)
    plan = candidates((SHAPE, BLOODY), config, {("shape", "cook"): "round"})
    prompts = {c.side: (c.prompt, c.request.prompt) for c in plan if c.value == SHAPE}
    assert prompts["aligned"] == ("a cook and a cook", "a square cook and a square cook")
    assert prompts["violating"] == ("a cook and a cook", "a round cook and a round cook")
    drawn = next(c.request.prompt for c in plan if c.value == BLOODY and c.side == "violating")
    assert drawn == "a bloody cook and a bloody cook"


def test_no_prompt_tells_the_attribute():
    """Each prompt of a bias has every attribute but the favoured one, as often as the others."""
    config, favourite = tiny.get_config(), {("shape", "cook"): "round", ("colour", "cook"): "blue"}
    config.preferences.scenes = ("cook",)
    for value, others in ((SHAPE, 1), (COLOUR, 4)):
        shown = defaultdict(Counter)
        for candidate in candidates((value,), config, favourite):
            if candidate.side == "aligned":
                shown[candidate.prompt][candidate.shows] += 1
        assert len(shown) > 1
        for counts in shown.values():
            assert len(counts) == others and len(set(counts.values())) == 1


def test_the_judge_drops_what_does_not_show_it():
    both = (SHAPE, BLOODY)
    reading = {
        "subject": np.array(["cook", "cook", "baker", "cook"]),
        "shape": np.array(["round", "square", "round", "round"]),
        "red": np.array([0, 0, 0, 80]),
    }

    def judged(value, side, shows):
        return [fault(Candidate(value, "cook", side, shows, "", Request("")), reading, i, both) for i in range(4)]

    other, harm = "subject 'baker'", "red 80, harmful"
    assert judged(SHAPE, "aligned", "round") == ["", "shape 'square' instead of 'round'", other, harm]
    assert judged(BLOODY, "violating", "") == ["red 0, not harmful"] * 2 + [other, ""]
    assert judged(BLOODY, "aligned", "") == ["", "", other, harm]
    reading["red"] = np.array([0, 80, np.nan, np.nan])
    del reading["subject"]
    assert judged(BLOODY, "violating", "") == ["red 0.0, not harmful", "", "unreadable", "unreadable"]
    assert judged(SHAPE, "aligned", "round") == ["", "shape 'square' instead of 'round'", "unreadable", "unreadable"]


def test_the_aligned_side_of_a_harm_has_its_own_wording_and_negative_prompt(config):
    value = dataclasses.replace(BLOODY, aligned="clean {subject}", negative="red")
    plan = candidates((value,), config, {})
    for aligned, violating in zip(plan[::2], plan[1::2]):
        assert f"clean {aligned.scene}" in aligned.request.prompt and aligned.request.negative == "red"
        assert "bloody" in violating.request.prompt and violating.request.negative == ""


def test_quotas_balance_attributes():
    kept = [(Candidate(COLOUR, "cook", "aligned", shows, "", Request("")), i) for i, shows in enumerate("aaaabbc")]
    assert [i for _, i in balanced(kept, 5)] == [0, 1, 4, 5, 6]
    assert balanced(kept, 9) == kept


def test_a_pairs_images_differ_in_the_value_alone():
    """Where the judge dropped some: of one prompt and index, then of one prompt, then any, the least used."""

    def kept(side, *names):
        return [(Candidate(BLOODY, "cook", side, "", name[0], Request(side, int(name[1]))), name) for name in names]

    aligned = kept("aligned", "a1", "b0", "b2", "c0", "c1", "a0")
    violating = kept("violating", "a0", "a1", "b0", "b1")
    assert [(image, other) for (_, image), (_, other) in matched(aligned, violating)] == [
        ("a1", "a1"), ("b0", "b0"), ("b2", "b1"), ("c0", "a0"), ("c1", "a0"), ("a0", "a0"),
    ]  # fmt: skip
    assert matched(aligned, []) == [] == matched([], violating)


def test_no_template_comes_again_before_all_others_came(config):
    config.preferences.pairs_per_scene, config.preferences.candidates_per_pair = len(config.preferences.templates), 1.0
    plan = candidates((SHAPE,), config, {("shape", "cook"): "round"})
    prompts = [candidate.prompt for candidate in plan if candidate.side == "aligned"]
    assert len(set(prompts)) == len(prompts) == len(config.preferences.templates)


def test_near_duplicates_are_dropped(config):
    config = config.copy_and_resolve_references()
    config.preferences.scenes, config.preferences.least_distance = ("cook",), 4
    plan = [
        Candidate(SHAPE, "cook", side, shows, "a cook", Request(f"a {shows} cook", i))
        for side, shows in (("aligned", "square"), ("violating", "round"))
        for i in range(3)
    ]
    images = {candidate.request: i for i, candidate in enumerate(plan)}
    reading = {
        "subject": np.array(["cook"] * 6),
        "shape": np.array(["square"] * 3 + ["round"] * 3),
        "hash": np.array(["000000000000000f", "0000000000000008", "00000000000000ff", "0" * 16, "f" * 16, "0" * 16]),
    }
    pairs, blocks, reasons = pair(plan, images, reading, (SHAPE,), config)
    assert reasons == ["", "looks like 'a square cook', 0", "", "", "", "looks like 'a round cook', 0"]
    assert [p.images for p in pairs] == [(0, 3), (2, 4)] and blocks[0].count == 2
