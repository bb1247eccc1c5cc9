"""The preference data: made by the base itself, kept by the judge, stored under the neutral prompt."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from configs import tiny
from data_tools import build_preferences
from data_tools.build_preferences import Candidate, candidates, favoured, keep
from livo_jax import values
from livo_jax.data import Preferences
from livo_jax.generate import Request
from livo_jax.judges.shapeworld import judge

SHAPE, COLOUR, BLOODY = values.load(("shape", "colour", "bloody"))


@pytest.fixture(scope="module")
def config():
    config = tiny.get_config("smoke")
    config.sampling.steps, config.preferences.pairs_per_scene, config.preferences.census_per_scene = 12, 4, 4
    return config


@pytest.fixture(scope="module")
def built(config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("build") / "preferences"
    build_preferences.build(config, directory)
    return Preferences(directory)


def test_pairs_show_what_they_should(built, config):
    """Every record, judged again from its stored PNGs."""
    pixels = lambda png: np.asarray(Image.open(io.BytesIO(png)))
    assert {(b.value, b.scene) for b in built.blocks} == {
        (v.statement, scene) for v in (SHAPE, COLOUR, BLOODY) for scene in config.preferences.scenes
    }
    for block in built.blocks:
        value = values.find(block.value, (SHAPE, COLOUR, BLOODY))
        stereotypes = set()
        for i in range(block.start, block.start + block.count):
            record = {k: v if k in ("aligned", "violating") else v.decode() for k, v in built.source[i].items()}
            assert (record["value"], record["scene"]) == (block.value, block.scene)
            assert block.scene in record["prompt"].split()
            aligned, violating = (judge(pixels(record[side])[None]) for side in ("aligned", "violating"))
            assert aligned["subject"][0] == violating["subject"][0] == block.scene
            if value.kind == "bias":
                assert not set(value.attributes) & set(record["prompt"].split()), "the prompt is neutral"
                assert aligned[value.axis][0] != violating[value.axis][0]
                stereotypes.add(violating[value.axis][0])
            else:
                assert "bloody" in record["prompt"], "the harmful word stays in the prompt"
                assert aligned["red"][0] < BLOODY.harmful_from <= violating["red"][0]
            provenance = json.loads(record["provenance"])
            assert provenance["seed"] == config.seed and provenance["aligned"]["prompt"]
        assert value.kind == "harm" or len(stereotypes) == 1


def test_it_is_deterministic(built, config, tmp_path):
    build_preferences.build(config, tmp_path / "again")
    again = Preferences(tmp_path / "again")
    assert again.blocks == built.blocks
    assert all(again.source[i] == built.source[i] for i in range(len(built.source)))


def test_it_does_not_overwrite(built, config):
    with pytest.raises(FileExistsError, match="exists: remove it, or build into another --out"):
        build_preferences.build(config, built.directory)


def test_favourites_are_the_commonest():
    reading = {"shape": np.array(["round", "round", "square", "", "square", "square"])}
    assert favoured(reading, [SHAPE], ["baker", "cook"], 3) == {
        ("shape", "baker"): "round",
        ("shape", "cook"): "square",
    }
    with pytest.raises(ValueError, match="no neutral image the shape of baker, the shape of cook"):
        favoured({"shape": np.array([""] * 6)}, [SHAPE], ["baker", "cook"], 3)


def test_candidates_say_the_attribute_and_are_filed_under_the_neutral_prompt(config):
    favourite = {(v, s): a for v, a in (("shape", "round"), ("colour", "blue")) for s in config.preferences.scenes}
    plan = candidates((SHAPE, COLOUR, BLOODY), config, favourite)
    colours = [c for c in plan if c.value == COLOUR and c.scene == "cook"]
    assert [c.shows for c in colours if c.side == "violating"] == ["blue"] * 4
    assert [c.shows for c in colours if c.side == "aligned"] == ["green", "yellow", "white", "violet"]  # all others
    assert all(c.shows in c.request.prompt and c.shows not in c.prompt for c in colours)
    bloody = [c for c in plan if c.value == BLOODY]
    for aligned, violating in zip(bloody[::2], bloody[1::2]):
        assert aligned.prompt == violating.prompt == violating.request.prompt and "bloody" in aligned.prompt
        assert "bloody" not in aligned.request.prompt
        assert aligned.request.noise == violating.request.noise, "the same noise on both sides"


def test_the_judge_drops_what_does_not_show_it():
    both = (SHAPE, BLOODY)
    reading = {
        "subject": np.array(["cook", "cook", "baker", "cook"]),
        "shape": np.array(["round", "square", "round", "round"]),
        "red": np.array([0, 0, 0, 80]),
    }
    judged = lambda value, side, shows: [
        keep(Candidate(value, "cook", side, shows, "", Request("")), reading, i, both) for i in range(4)
    ]
    assert judged(SHAPE, "aligned", "round") == [True, False, False, False]
    assert judged(BLOODY, "violating", "") == [False, False, False, True]
    assert judged(BLOODY, "aligned", "") == [True, True, False, False]


def test_scenes_without_pairs_are_all_named(config, tmp_path):
    config = config.copy_and_resolve_references()
    config.preferences.scenes = ("cook", "king", "elf")
    with pytest.raises(ValueError, match="too few candidates(.|\n)*king(.|\n)*elf"):
        build_preferences.build(config, tmp_path / "preferences")
    assert not (tmp_path / "preferences").exists()
