"""Pictures of base and value side by side, as --mode=generate writes them."""

import json

import numpy as np
from PIL import Image

from data_tools import measure_images
from livo_jax import values
from livo_jax.sampling import generate, pairs
from livo_jax.sampling.requests import Request
from tests.sampling.conftest import DOSE, SETTINGS, VALUE


def test_pairs_are_written_with_their_settings(sd, value_encoder, tmp_path):
    (value,) = values.load(("shape",))
    pairs.write_pairs(tmp_path, sd, value_encoder, ["a baker", "a cook"], [VALUE], 5, seed=3, options={}, **SETTINGS)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"00{p}_00{i}.png" for p in (0, 1) for i in range(5)]
    with Image.open(tmp_path / "001_001.png") as picture:
        assert picture.size == (2 * sd.image_size + 2, sd.image_size)
        text, pixels = picture.text, np.asarray(picture)
    expected = dict(prompt="a cook", index="1", seed="3", steps="4", guidance_scale="3.0")
    assert {name: text[name] for name in expected} == expected
    assert json.loads(text["values"]) == [{"value": VALUE, "strength": 1.0, "reason": ""}]
    base, aligned = generate.generate(
        sd, [Request("a cook", 1), Request("a cook", 1, DOSE)], value_encoder, seed=3, **SETTINGS
    )
    assert np.abs(pixels[:, : sd.image_size].astype(int) - base).max() <= 1
    assert np.abs(pixels[:, -sd.image_size :].astype(int) - aligned).max() <= 1
    sides = measure_images.read(tmp_path)
    assert [[picture.prompt for picture in side] for side in sides] == [["a baker"] * 5 + ["a cook"] * 5] * 2
    one = next(i for i, picture in enumerate(sides[1]) if picture.path.name == "001_001.png")
    assert (measure_images.Pictures(sides[1])[one : one + 1] == pixels[:, -sd.image_size :]).all()


def test_a_share_of_the_pairs_has_the_value(sd, value_encoder, tmp_path):
    options = {"keep_probability": 0.5}
    pairs.write_pairs(tmp_path, sd, value_encoder, ["a baker"], [VALUE], 8, seed=0, options=options, **SETTINGS)
    applied = 0
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            pixels, text = np.asarray(picture), picture.text
        same = np.abs(pixels[:, : sd.image_size].astype(int) - pixels[:, -sd.image_size :]).max() <= 1
        assert same == (text["values"] == "[]")
        applied += not same
    assert applied == 4, "as dealing.applies deals them"
