"""The classifier of words and letters: its features, its file, its fit, and the one that the package brings."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from data_tools import fit_retriever
from livo_jax import values
from livo_jax.retrieval import linear, ngrams
from livo_jax.retrieval.retriever import Retriever
from tests.retrieval.test_labelled_sets import ROOT

NAMES = ("nudity", "gore")
VALUES = values.load(NAMES)


def test_pieces_are_words_pairs_and_runs_of_letters():
    assert len(ngrams.buckets("ab c")) == 2 + 1 + sum(len(" ab c ") - n + 1 for n in ngrams.LETTERS)
    assert (ngrams.buckets("A  blóody sword!") == ngrams.buckets("a bloody, sword")).all(), "as the keywords read it"
    assert (ngrams.buckets("a sword") < 2**ngrams.BITS).all()
    assert len(ngrams.buckets("")) == len(ngrams.buckets("!?")) == 0
    assert len(set(ngrams.buckets("x").tolist()) - set(ngrams.buckets("y").tolist())) > 0


@pytest.fixture
def file(tmp_path):
    """A classifier for which the word "red" is gore, and nothing is nudity."""
    weights = np.zeros((2**ngrams.BITS, 2))
    weights[ngrams.buckets("red")[0], 1] = 60
    path = tmp_path / "red.safetensors"
    fitted = linear.Fitted(NAMES, weights.astype(np.float16), [-9, -9], [0.5, 0.5], {"from": "a test"}, {})
    linear.save(path, ngrams.FORMAT, fitted)
    return path


def test_a_classifier_finds(file):
    find = ngrams.NGrams(VALUES[::-1], file)
    assert find.card == {"from": "a test"} and find.thresholds == {"gore": 0.5, "nudity": 0.5}
    ((name, (score, reason)),) = find("a red wall").items()
    pieces = len(ngrams.buckets("a red wall"))
    assert name == "gore" and score == pytest.approx(1 / (1 + np.exp(9 - 60 / np.sqrt(pieces))), rel=1e-3)
    assert reason.endswith(f"({score:.2f}, from 0.50)")
    assert find.scores("")["gore"] == pytest.approx(1 / (1 + np.exp(9))) and find("a blue wall") == {}
    assert [value.name for value in Retriever(VALUES, ("ngrams",), classifier=file)("a red wall")] == ["gore"]


def altered(arrays, about):
    arrays["weights"][7, 0] = 1
    return arrays, about


def infinite(arrays, about):
    arrays["thresholds"][0] = np.nan
    return arrays, about | {"sha256": linear.digest(arrays, about["values"])}


def cut(arrays, about):
    return {**arrays, "weights": arrays["weights"][:100].copy()}, about


@pytest.mark.parametrize(
    "damage, error",
    [
        (altered, "is damaged, or of an earlier livo_jax: its numbers and names are not those that were written"),
        (cut, "is damaged, or of an earlier livo_jax: its numbers and names"),
        (infinite, "is damaged: its numbers are not finite"),
        (lambda arrays, about: (arrays, about | {"values": '["gore", "nudity"]'}), "numbers and names are not those"),
        (lambda arrays, about: (arrays, about | {"values": "5"}), "is damaged: its metadata: values=5"),
        (lambda arrays, about: (arrays, {}), "is no classifier of 'livo_jax n-grams 1'"),
        (lambda arrays, about: (arrays, about | {"values": "nudity"}), "is damaged: its metadata"),
        (lambda arrays, about: ({"weights": arrays["weights"]}, about), "is no classifier"),
    ],
)
def test_a_damaged_file_is_told(file, damage, error):
    import safetensors

    with safetensors.safe_open(file, framework="numpy") as opened:
        about, arrays = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}
    save_file(*damage(arrays, about)[:1], file, damage(arrays, about)[1])
    with pytest.raises(ValueError, match=error):
        ngrams.NGrams(VALUES, file)


def test_a_file_that_cannot_serve_is_told(file, tmp_path):
    with pytest.raises(ValueError, match="is fitted for nudity, gore, not for zombie, gender: fit one for these"):
        ngrams.NGrams(values.load(("gore", "zombie", "gender")), file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is damaged: "):
        ngrams.NGrams(VALUES, file)
    with pytest.raises(FileNotFoundError, match="fit_retriever makes one"):
        ngrams.NGrams(VALUES, tmp_path / "nothing")


def test_a_regression_has_no_slope_left():
    """At the least loss the mean residual is nought, and the weights are the residuals' pull over the penalty."""
    from scipy.sparse import csr_matrix

    rng = np.random.default_rng(0)
    x, y = csr_matrix(rng.normal(size=(60, 5))), rng.random(60) < 0.4
    weights, bias = fit_retriever.fit(x, y, penalty=0.1)
    residual = y - 1 / (1 + np.exp(-(x @ weights + bias)))
    assert residual.mean() == pytest.approx(0, abs=1e-4)
    np.testing.assert_allclose(weights, x.T @ residual / 60 / 0.1, atol=1e-3)


SETS = """
[[set]]
file = "set.csv"
label = "kind"
values = ["blood=gore", "insult=unscored", "safe=none"]
beginnings = true
over_trigger = 0.1
source = "a test"
licence = "Apache-2.0"
"""


@pytest.fixture
def folder(tmp_path):
    nouns = [
        f"{colour} {noun}" for colour in ("red", "old", "big", "new") for noun in "wall cup car hat bed box".split()
    ]
    rows = [f"a {noun} with blood on it,blood\na {noun} with flowers on it,safe\n" for noun in nouns]
    (tmp_path / "set.csv").write_text("prompt,kind\nsomething rude,insult\n" + "".join(rows))
    (tmp_path / "sets.toml").write_text(SETS)
    return tmp_path


def fit(folder):
    call = [sys.executable, "-m", "data_tools.fit_retriever", f"--sets={folder}/sets.toml", f"--folder={folder}"]
    return subprocess.run([*call, f"--out={folder}/own.safetensors"], cwd=ROOT, capture_output=True, text=True)


def test_the_command_fits_on_labelled_prompts(folder):
    done = fit(folder)
    assert done.returncode == 0, done.stderr
    (gore,) = Retriever(values.load(("gore",)), ("ngrams",), classifier=folder / "own.safetensors")(
        "a chair with blood"
    )
    assert gore.reason.startswith("ngrams: its words and letters are as in such prompts")
    card = ngrams.read(folder / "own.safetensors").card
    assert json.loads(done.stdout) == card and card["held_out"]["gore"]["recall"] > 0.9
    first, persons = card["sets"]
    assert first["licence"] == "Apache-2.0" and len(first["sha256"]) == 64 and persons["file"] == "persons"


def test_the_command_says_all_that_is_wrong(folder):
    (folder / "sets.toml").write_text(
        SETS + SETS.replace("blood=gore", "blud=gore") + '[[set]]\nfile="x"\nfiel="y"\n' + SETS.replace("0.1", '"few"')
        + SETS.replace("0.1", "1.5") + SETS.replace("[\"blood=gore", "[1, \"blood=gore").replace("true", '"yes"')
    )  # fmt: skip
    done = fit(folder)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "no value for the label 'blood'" in done.stderr and "no row has the label 'blud'" in done.stderr
    assert "set 4: over_trigger='few' is no number" in done.stderr
    assert "set 5: over_trigger=1.5 is no share below 1" in done.stderr
    assert "set 6: values=[1, 'blood=gore', " in done.stderr
    assert "is no list of texts, beginnings='yes' is no true or false" in done.stderr
    assert "set 3 lacks ['licence', 'source'] and has ['fiel']" in done.stderr


def test_what_the_package_brings():
    """Its card says on what; benign prompts, and persons of whatever title, are no harm to it."""
    find = ngrams.NGrams(values.load(("sexual", "violence", "hate")))
    assert all(entry["source"] and entry["licence"] for entry in find.card["sets"])
    for prompt in (
        "a golden retriever catching a frisbee",
        "a white lawyer",
        "a nun lighting candles",
        "a bearded man",
    ):
        assert find(prompt) == {}, prompt
