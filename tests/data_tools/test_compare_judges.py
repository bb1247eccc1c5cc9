"""Judges that agree or are right as often as is known are told to."""

import json
import subprocess
import sys

import numpy as np
import pytest

from data_tools.compare_judges import compare, read_truth
from livo_jax import values
from tests.data_tools.test_measure_images import PROMPTS, ROOT, SHAPES, draw, write

SHAPE, BLOODY = values.load(("shape", "bloody"))


def test_kappa_and_accuracy_of_known_readings():
    """Of 8 images the first judge reads one shape wrong and one not at all; the other is right, and so for blood."""
    prompts = ["a"] * 4 + ["b"] * 4
    truth = {"shape": np.array(["round", "square"] * 4), "red": np.array([0.0, 20.0] * 3 + [np.nan] * 2)}
    wrong = {"shape": truth["shape"].copy(), "red": np.array([0, 20, 13, 20, 0, np.nan, 0, 0.0])}
    wrong["shape"][:2] = ["square", ""]
    readings = {"one": wrong, "other": truth}
    found = {(r["value"], r["metric"], r["judge"]): r for r in compare(readings, (SHAPE, BLOODY), prompts, truth)}
    accuracy = found[SHAPE.statement, "accuracy", "one"]
    assert accuracy["mean"] == pytest.approx((2 / 4 + 1) / 2) and accuracy["images"] == 8
    assert accuracy["ci95"][0] < 0.75 < accuracy["ci95"][1]
    assert found[SHAPE.statement, "accuracy", "other"]["mean"] == 1
    of_blood = found[BLOODY.statement, "accuracy", "one"]  # of the six whose truth is known
    assert of_blood["mean"] == pytest.approx((3 / 4 + 1 / 2) / 2) and of_blood["images"] == 6
    # Beyond chance: 6 of 8 agree, and (4 * 4 + 3 * 4) / 64 would by chance.
    kappa = found[SHAPE.statement, "kappa", "one"]
    assert kappa["mean"] == pytest.approx((6 / 8 - 28 / 64) / (1 - 28 / 64)) and kappa["other"] == "other"
    assert kappa["ci95"][0] <= kappa["mean"] <= kappa["ci95"][1]


def test_what_cannot_be_true_is_told(tmp_path):
    truths = [{"shape": "oval"}, {"red": "much"}, "round", {"shape": "round", "red": 3}]
    rows = [json.dumps({"file_name": f"{i}.png", "prompt": "a", "truth": x}) for i, x in enumerate(truths)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError) as error:
        read_truth(tmp_path, [], (SHAPE, BLOODY))
    for told in (":1: truth of shape is 'oval', not round, square", ":2: truth of red is 'much', not a number", ":3:"):
        assert told in str(error.value)
    (tmp_path / "metadata.jsonl").write_text(rows[3])
    found = read_truth(tmp_path, ["3.png", "4.png"], (SHAPE, BLOODY))
    assert found["shape"].tolist() == ["round", ""] and found["red"][0] == 3 and np.isnan(found["red"][1])
    assert read_truth(tmp_path, ["4.png"], (SHAPE, BLOODY)) == {}


def test_the_command(tmp_path):
    folder = write(tmp_path / "ours", draw(SHAPES))
    lines = [
        json.dumps({"file_name": f"{i:02d}.png", "prompt": prompt, "truth": {"shape": shape}})
        for i, (prompt, shape) in enumerate(zip(PROMPTS, SHAPES))
    ]
    (tmp_path / "ours" / "metadata.jsonl").write_text("\n".join(lines))
    call = [sys.executable, "-m", "data_tools.compare_judges", "--config=configs/tiny.py", f"--images={folder}"]
    call += ["--config.principles=('shape',)", f"--out={tmp_path / 'out.json'}"]
    done = subprocess.run([*call, "--judge=shapeworld"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["judges"] == [{"name": "shapeworld"}]
    assert [(r["metric"], r["mean"], r["images"]) for r in document["rows"]] == [("accuracy", 1.0, len(SHAPES))]
    assert "accuracy  shapeworld" in done.stdout
