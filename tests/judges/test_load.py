"""What every judge has in common."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from data_tools.shapeworld import at_work, render
from livo_jax import judges, values
from livo_jax.files.settings import import_named
from livo_jax.judges.shapeworld import Worker
from tests.documented import example


def test_images_of_one_colour_cannot_be_read():
    """A black image, what a broken model draws, is no harmless one."""
    found = values.load(("shape", "bloody"))
    judge = judges.load(ConfigDict({"judge": "shapeworld"}), found, ("baker",))
    picture = render(np.random.default_rng(0), at_work("baker", Worker("round", "blue")))
    red = np.full((32, 32, 3), (200, 16, 32), np.uint8)
    reading = judge(np.stack([np.zeros_like(red), picture, red]))
    assert reading["shape"].tolist() == ["", "round", ""] and reading["subject"].tolist() == ["", "baker", ""]
    np.testing.assert_array_equal(reading["red"], [np.nan, 0, np.nan])


def test_a_judge_of_the_users_own(tmp_path, monkeypatch):
    """The page's, named by its module, which is on Python's path."""
    (tmp_path / "reddest.py").write_text(example("judges.md", "def make(config, values, subjects):"))
    monkeypatch.syspath_prepend(tmp_path)
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[0, 0, 0, 0] = 255
    judge = judges.load(ConfigDict({"judge": "reddest:make"}), values.load(("bloody",)), ())
    np.testing.assert_array_equal(judge(images)["red"], [1 / 16, np.nan])  # one colour shows nothing, whoever judges
    assert judge.pinned == {"name": "reddest", "version": "1", "harmful_from": {"bloody": 12}}
    for name, told in {
        "nowhere.reddest:make": "Python finds no module 'nowhere': set PYTHONPATH",
        "reddest:made": "the module 'reddest' has no 'made'",
        ":make": "name one of your own as package.module:Name",
        "reddest:": "name one of your own as package.module:Name",
        "reddest": "choose from classifier, clip, detector, llava, .*vlm, or name one of your own, package.module:Name",
    }.items():
        with pytest.raises(ValueError, match=told):
            judges.load(ConfigDict({"judge": name}), (), ())


def test_a_judge_of_the_users_own_that_says_what_it_is(tmp_path, monkeypatch):
    (tmp_path / "pinned.py").write_text(
        "from livo_jax.judges import Judge\n"
        "def make(config, values, subjects):\n"
        "    return Judge(lambda images: {'red': images[:, 0, 0, 0] / 255}, {'name': 'corner', 'version': '2'})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    judge = judges.load(ConfigDict({"judge": "pinned:make"}), values.load(("bloody",)), ())
    assert judge.pinned == {"name": "corner", "version": "2", "harmful_from": {"bloody": 12}}
    assert np.isnan(judge(np.zeros((1, 4, 4, 3), np.uint8))["red"])


def test_an_axis_that_it_does_not_read_is_told_at_the_first_image(tmp_path, monkeypatch):
    (tmp_path / "blind.py").write_text("def make(*asked):\n    return lambda images: {'sky': images}\n")
    monkeypatch.syspath_prepend(tmp_path)
    judge = judges.load(ConfigDict({"judge": "blind:make"}), values.load(("shape", "bloody")), ())
    with pytest.raises(ValueError, match="blind:make reads sky, not shape, red"):
        judge(np.zeros((1, 4, 4, 3), np.uint8))


def test_thresholds_are_pinned_and_in_range():
    config = ConfigDict({"judge": "shapeworld", "judging": {"thresholds": (20, 1024)}})
    judge = judges.load(config, values.load(("bloody",)), ())
    pinned = {"name": "shapeworld", "thresholds": [20, 1024], "harmful_from": {"bloody": 12}}
    assert judge.thresholds == (20, 1024) and judge.pinned == pinned
    config.judging.thresholds = (0, 1025)
    with pytest.raises(ValueError, match="(?s)thresholds: 0 is not above 0 and at most 1024.*1025.*axis='blood'"):
        judges.load(config, values.load(("bloody", "gore")), ())


def test_labels_that_no_value_reads_are_refused_with_all_else():
    judging = {"labels": ("nude=nudity", "Man=gender:male", "x=red"), "thresholds": (2000,)}
    config = ConfigDict({"judge": "shapeworld", "judging": judging})
    with pytest.raises(
        ValueError, match="(?s)2000 is not above 0.*'nude=nudity' is of an axis.*'Man=gender:male'"
    ) as error:
        judges.load(config, values.load(("bloody",)), ())
    assert "x=red" not in str(error.value)


def test_a_mistake_in_the_users_module_is_shown_as_it_is(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken.py").write_text("import math\nmath.no_such_thing\n")
    with pytest.raises(AttributeError, match="no_such_thing"):
        import_named("broken:make", "config.judge")
    (tmp_path / "misses.py").write_text("import a_module_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        import_named("misses:make", "config.judge")
