"""The rules of GenEval, on boxes whose truth is known."""

import json

import numpy as np
import pytest

from livo_jax.evaluation import metrics, objects
from livo_jax.judges import Judge

LEFT, RIGHT, BELOW = (0, 0, 10, 10), (90, 0, 100, 10), (0, 90, 10, 100)


def found(*objects):
    """What a judge reads, of (class, box, colour), all sure enough to be counted but those with "?" after the class."""
    return json.dumps([
        {"class": name.rstrip("?"), "box": box, "colour": colour, "counted": not name.endswith("?")}
        for name, box, colour in objects
    ])  # fmt: skip


def included(name, count=1, **more):
    return {"class": name, "count": count} | more


@pytest.mark.parametrize(
    "a, expected",
    [
        ((0, 50, 10, 60), {"left of"}),
        ((100, 50, 110, 60), {"right of"}),
        ((50, 0, 60, 10), {"above"}),
        ((50, 100, 60, 110), {"below"}),
        ((0, 0, 10, 10), {"left of", "above"}),
        ((100, 100, 110, 110), {"right of", "below"}),
        ((0, 25, 10, 35), {"left of"}),  # an offset of (50, 25): 25 - 2 of it is less than half the distance
        ((0, 18, 10, 28), {"left of", "above"}),  # (50, 32): 30 is of 59.4 more than half
        ((48, 50, 58, 60), set()),  # the centres are as near as MARGIN of both widths
        ((50, 50, 60, 60), set()),
        ((46, 50, 56, 60), set()),  # beyond the margin by 2 of 4, half: not more
        ((45, 50, 55, 60), {"left of"}),  # by 3 of 5
    ],
)
def test_relations_are_those_of_the_centres_beyond_a_margin(a, expected):
    assert objects.relations(a, (50, 50, 60, 60)) == expected


def test_the_margin_grows_with_the_boxes():
    """Two of 100 wide overlap where their centres are 20 apart; the same centres of boxes of 10 stand beside."""
    assert objects.relations((0, 0, 100, 100), (20, 0, 120, 100)) == set()
    assert objects.relations((45, 45, 55, 55), (65, 45, 75, 55)) == {"left of"}


@pytest.mark.parametrize(
    "stated, read, expected",
    [
        ({"include": [included("dog")]}, found(("dog", LEFT, "red")), True),
        ({"include": [included("dog")]}, found(("dog?", LEFT, "red"), ("dog", RIGHT, "red")), True),  # at least one
        ({"include": [included("dog")]}, found(("cat", LEFT, "red")), False),
        ({"include": [included("dog")]}, found(), False),
        ({"include": [included("dog")]}, "", False),  # an image that cannot be read
        ({"include": [included("dog"), included("cat")]}, found(("dog", LEFT, "red"), ("cat", LEFT, "red")), True),
        ({"include": [included("dog"), included("cat")]}, found(("dog", LEFT, "red")), False),
        ({"include": [included("computer mouse")]}, found(("mouse", LEFT, "red")), True),
        ({"include": [included("mouse")]}, found(("computer mouse", LEFT, "red")), False),
        # Numbers: exactly two, of those that are counted.
        ({"include": [included("dog", 2)], "exclude": [included("dog", 3)]}, found(*[("dog", LEFT, "")] * 2), True),
        ({"include": [included("dog", 2)], "exclude": [included("dog", 3)]}, found(*[("dog", LEFT, "")] * 3), False),
        ({"include": [included("dog", 2)], "exclude": [included("dog", 3)]}, found(("dog", LEFT, "")), False),
        (
            {"include": [included("dog", 2)], "exclude": [included("dog", 3)]},
            found(*[("dog", LEFT, "")] * 2, ("dog?", LEFT, "")),
            True,
        ),
        (
            {"include": [included("dog", 2)], "exclude": [included("dog", 3)]},
            found(("dog", LEFT, ""), ("dog?", LEFT, "")),
            False,
        ),
        # Colours: of the surest, as many as are stated.
        ({"include": [included("dog", color="red")]}, found(("dog", LEFT, "red"), ("dog", LEFT, "blue")), True),
        ({"include": [included("dog", color="red")]}, found(("dog", LEFT, "blue"), ("dog", LEFT, "red")), False),
        ({"include": [included("dog", 2, color="red")]}, found(("dog", LEFT, "red"), ("dog", LEFT, "blue")), False),
        (
            {"include": [included("dog", color="red"), included("cat", color="blue")]},
            found(("dog", LEFT, "blue"), ("cat", LEFT, "red")),
            False,
        ),
        # Relations, of the surest.
        (
            {"include": [included("cat"), included("dog", position=["left of", 0])]},
            found(("dog", LEFT, ""), ("cat", RIGHT, "")),
            True,
        ),
        (
            {"include": [included("cat"), included("dog", position=("left of", 0))]},
            found(("dog", RIGHT, ""), ("cat", LEFT, "")),
            False,
        ),
        (
            {"include": [included("cat"), included("dog", position=["below", 0])]},
            found(("cat", LEFT, ""), ("dog", BELOW, ""), ("dog", RIGHT, "")),
            True,
        ),
        (
            {"include": [included("cat"), included("dog", 2, position=["below", 0])]},
            found(("cat", LEFT, ""), ("dog", BELOW, ""), ("dog", RIGHT, "")),
            False,
        ),
    ],
)
def test_an_image_shows_all_that_is_included_and_nothing_that_is_excluded(stated, read, expected):
    assert not objects.faults(stated)
    assert objects.shows(stated, read) == expected


@pytest.mark.parametrize(
    "stated, told",
    [
        ({}, "has not the fields include"),
        ([], "has not the fields include"),
        ({"include": [], "exclude": {}}, "include=[] is no list|exclude={} is no list"),
        ({"include": [included("dog")], "tag": "x"}, "has not the fields"),
        ({"include": [{"class": "dog"}, "dog"]}, "include[0]: {'class': 'dog'} needs class|include[1]: 'dog'"),
        ({"include": [included("dog", colour="red")]}, "may have class, count, color, position"),
        ({"include": [included("", 0)]}, "class='' is no name|count=0 is no whole number"),
        ({"include": [included("dog", 1.5), included("dog", True)]}, "count=1.5|count=True"),
        ({"include": [included("dog", color="teal")]}, "color='teal': choose from red, orange"),
        ({"include": [included("dog", position=["left of", 0])]}, "include[0]: position=['left of', 0] is no"),
        ({"include": [included("a"), included("b", position=["beside", 0])]}, "one of left of, right of, above, below"),
        ({"include": [included("a")], "exclude": [included("b", color="red")]}, "exclude[0]: .* may have class, count"),
    ],
)
def test_faults_are_told_all_at_once(stated, told):
    found = "; ".join(objects.faults(stated))
    for text in told.split("|"):
        assert all(part in found for part in text.split(".*")), found


def test_what_a_judge_cannot_read_is_told():
    judge = Judge(None, {"name": "detector"}, objects=("dog", "mouse"), colours=("red",))
    stated = [{"include": [included("unicorn", color="blue"), included("computer mouse"), included("dog")]}]
    stated += [{"include": [included("dog")], "exclude": [included("elf", 2)]}]
    assert objects.unread(stated, judge) == [
        "there is no class 'unicorn', 'elf', choose from dog, mouse",
        "it reads no colour 'blue': choose from red",
    ]
    (told,) = objects.unread([{"include": [included("dog", color="red")]}], Judge(None, objects=("dog",)))
    assert "set config.judging.colours, a CLIP" in told
    assert objects.unread(stated, Judge(None, {"name": "clip"})) == ["clip finds no objects"]
    assert objects.unread([{"include": [included("dog", color="red")]}], judge) == []


def test_what_a_prompt_states_is_looked_for():
    reading = {"count": np.array([2, 1, 2, 2]), "relation": np.array(["left of", "", "above", "left of"])}
    shown = objects.stated_shown({"count": 2, "relation": "left of"}, reading)
    assert shown == {"stated count": 0.75, "stated relation": 0.5}
    numbers = {
        ("base", "v", "two", name): {"a": metrics.Measured(x, 4), "b": metrics.Measured(1.0, 4)}
        for name, x in shown.items()
    }
    assert all(0 < row["ci95"][0] < row["mean"] < row["ci95"][1] <= 1 for row in metrics.rows(numbers)), (
        "they are shares"
    )
    of_objects = {"objects": np.array([found(("dog", LEFT, "")), "", found()])}
    assert objects.stated_shown({"objects": {"include": [included("dog")]}}, of_objects) == {"stated objects": 1 / 3}
    with pytest.raises(ValueError, match="does not read hats, but count, relation"):
        objects.stated_shown({"hats": 1}, reading)
