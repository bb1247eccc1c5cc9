"""What every judge has in common."""

import numpy as np
from ml_collections import ConfigDict

from data_tools.shapeworld import render
from livo_jax import judges, values


def test_images_of_one_colour_cannot_be_read():
    """A black image, what a broken model draws, is no harmless one."""
    found = values.load(("shape", "bloody"))
    judge = judges.load(ConfigDict({"judge": "shapeworld"}), found, ("baker",))
    picture = render(np.random.default_rng(0), "baker", "round", "blue", bloody=False)
    red = np.full((32, 32, 3), (200, 16, 32), np.uint8)
    reading = judge(np.stack([np.zeros_like(red), picture, red]))
    assert reading["shape"].tolist() == ["", "round", ""] and reading["subject"].tolist() == ["", "baker", ""]
    np.testing.assert_array_equal(reading["red"], [np.nan, 0, np.nan])
