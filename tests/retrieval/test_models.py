"""The backends that look at the model itself: its text states, and its first steps of sampling."""

import numpy as np
import pytest

from data_tools import fit_retriever
from livo_jax import values
from livo_jax.retrieval import first_steps, linear, states
from livo_jax.retrieval.labelled_sets import Row
from livo_jax.retrieval.retriever import Retriever, run_file, run_files
from livo_jax.value_encoders.base import ValueTokens

VALUES = values.load(("shape", "bloody"))
SHAPE, BLOODY = VALUES
TRADES = "baker cook smith tailor farmer miller sailor diver doctor nurse".split()


class Pushing(ValueTokens):
    """A token of fixed length that is turned as the text ends: it moves every prediction."""

    def __init__(self, config):
        self.config = config

    def tokens(self, ids, text_encoder):
        return 30 * text_encoder(ids).pooled[:, None]


@pytest.fixture(scope="module")
def model(small):
    sd = small[0]
    return sd, Pushing(sd.text_encoder.config)


@pytest.fixture(scope="module")
def read(model):
    return first_steps.make_reader(*model, [value.statement for value in VALUES])


def test_effects_and_movements(read):
    effects, movements = read("a photo of a baker")
    assert effects.shape == (first_steps.NOISES * 8 * 8 * 4,) and np.linalg.norm(effects) == pytest.approx(1, abs=1e-5)
    assert movements.shape == (2,) and (0 < movements).all() and (movements < 1).all()
    again, _ = read("a photo of a baker")
    other, _ = read("a photo of a cook")
    assert (again == effects).all(), "the noises are fixed"
    assert not np.allclose(other, effects)


def test_the_empty_prompt_draws_nothing_of_its_own(read):
    effects, movements = read("")
    assert (effects == 0).all() and np.isfinite(movements).all()


def test_one_program_serves_all_prompts(read, monkeypatch):
    """Compiling fails here, and prompts of other lengths are looked at all the same."""
    monkeypatch.setattr("jax._src.compiler.compile_or_get_cached", None)
    read("an old baker")
    read("")


def test_evaluations_are_told():
    assert first_steps.count_evaluations(2) == first_steps.NOISES * (first_steps.LOOKED_AT + 3)


def write(path, kind, known, rows, names=("shape", "bloody"), weights=None):
    weights = np.zeros((rows, len(names)), np.float32) if weights is None else weights
    fitted = linear.Fitted(names, weights, [3.0, -3.0][: len(names)], [0.5] * len(names), {"model": "a test"}, known)
    linear.save(path, kind, fitted)
    return path


@pytest.fixture
def steps_file(tmp_path, read):
    known = dict(zip(first_steps.KNOWN, read(first_steps.ASKED)))
    weights = np.zeros((first_steps.NOISES * 256 + 1, 2), np.float32)
    weights[-1, 0] = 1
    return write(tmp_path / "steps.safetensors", first_steps.FORMAT, known, len(weights), weights=weights)


def test_first_steps_decide(model, steps_file):
    sd, value_encoder = model
    find = Retriever(VALUES, ("first_steps",), sd=sd, value_encoder=value_encoder, files={"first_steps": steps_file})
    (shape,) = find("a photo of a baker")
    assert shape.name == "shape" and shape.reason.startswith("first_steps: the model begins to draw it as such prompts")
    assert find.backends["first_steps"].evaluations == first_steps.count_evaluations(2)
    # In another order than the file's; and of a value that the file tells by effects, without tokens.
    turned = Retriever(
        VALUES[::-1], ("first_steps",), sd=sd, value_encoder=value_encoder, files={"first_steps": steps_file}
    )
    assert turned("a photo of a baker") == [shape]
    harm = Retriever((BLOODY,), ("first_steps",), sd=sd, files={"first_steps": steps_file})
    assert harm("a photo of a baker") == []


def test_what_cannot_look_is_told(model, steps_file, tmp_path):
    sd, value_encoder = model
    files = {"first_steps": steps_file}
    with pytest.raises(ValueError, match="first_steps needs sd.*first_steps needs a file.*--features=first_steps"):
        Retriever(VALUES, ("first_steps",))
    with pytest.raises(ValueError, match="tells shape by how far the value's trained token .* no value encoder: give"):
        Retriever(VALUES, ("first_steps",), sd=sd, files=files)
    fitted = linear.load(steps_file, first_steps.FORMAT, "", first_steps.KNOWN)
    fitted.known[first_steps.KNOWN[1]] *= 0.7
    linear.save(tmp_path / "others.safetensors", first_steps.FORMAT, fitted)
    with pytest.raises(ValueError, match="was fitted for another model, 'a test': its movements of a text are not"):
        others = {"first_steps": tmp_path / "others.safetensors"}
        Retriever(VALUES, ("first_steps",), sd=sd, value_encoder=value_encoder, files=others)
    other = values.load(("colour",))
    with pytest.raises(ValueError, match="is fitted for shape, bloody, not for colour"):
        Retriever(other, ("first_steps",), sd=sd, value_encoder=value_encoder, files=files)
    with pytest.raises(FileNotFoundError, match="--features=first_steps makes one"):
        Retriever(VALUES, ("first_steps",), sd=sd, files={"first_steps": tmp_path / "nothing"})


def test_a_run_names_its_files(tmp_path):
    file = tmp_path / run_file("states")
    file.parent.mkdir()
    file.write_bytes(b"x")
    assert run_files(tmp_path) == {"states": file}
    (asking,) = values.load(("bloody",), principles_with(tmp_path, '["first_steps", "states"]'))
    with pytest.raises(ValueError, match=f"first_steps needs a file .*--features=first_steps --workdir={tmp_path}"):
        run_files(tmp_path, (asking,))


def principles_with(folder, auto: str):
    file = folder / "principles.toml"
    text = values.PRINCIPLES.read_text()
    head, bloody = text.split("[bloody]")
    file.write_text(f"{head}[bloody]\nauto = {auto}{bloody}")
    return file


def test_states_are_those_of_the_prompts_own_tokens(sd):
    pooled_and_mean = states.make_reader(sd)(["a photo of a baker"])[0]
    text = sd.text_encoder(sd.tokenize(["a photo of a baker"]))
    own = 1 + 5 + 1  # from the start's token to the end's
    np.testing.assert_allclose(pooled_and_mean[:20], text.pooled[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pooled_and_mean[20:], text.last_hidden_state[0, :own].mean(0), rtol=1e-4, atol=1e-5)


def rows() -> list[Row]:
    """Prompts for the values, none of them one too."""
    found = []
    for trade in TRADES:
        for template in ("a {}", "a photo of a {}", "a picture of a {}", "the {} at work"):
            found.append(Row(template.format(trade), (), frozenset({"shape"})))
            found.append(Row(template.format(f"bloody {trade}"), (), frozenset({"shape", "bloody"})))
            found.append(Row(template.format(f"round {trade}"), (), frozenset()))
    return found


def test_states_are_fitted_and_refused_elsewhere(sd, small, tmp_path):
    class Models:
        pass

    models = Models()
    models.sd = sd
    known = {value.name: value for value in VALUES}
    kind = fit_retriever.KINDS["states"]
    fitted = fit_retriever.fit_all([({"file": "x", "over_trigger": 0.01}, rows())], known, kind, kind.penalty, models)
    assert fitted.names == ("bloody", "shape") and fitted.weights.shape == (40, 2)
    assert fitted.card["bloody"]["recall"] > 0.9, "a random encoder still tells its words apart"
    path = tmp_path / "states.safetensors"
    linear.save(path, states.FORMAT, fitted)
    find = Retriever((BLOODY,), ("states",), sd=sd, files={"states": path})
    assert [value.name for value in find("a photo of a bloody baker")] == ["bloody"]
    assert find("a photo of a baker") == []
    with pytest.raises(ValueError, match="was fitted for another model, '': its states of a text are not this one's"):
        Retriever((BLOODY,), ("states",), sd=small[0], files={"states": path})
    path.write_bytes(path.read_bytes()[:-8] + b"\0" * 8)
    with pytest.raises(ValueError, match="is damaged, or of an earlier livo_jax: its numbers and names"):
        Retriever((BLOODY,), ("states",), sd=sd, files={"states": path})


def test_effects_are_fitted_along_their_difference():
    rng = np.random.default_rng(0)
    y = np.arange(200) % 2 == 0
    direction = np.eye(50)[3]
    effects = 0.1 * rng.normal(size=(200, 50)) + np.outer(y, direction)
    weights, bias = fit_retriever.fit_along(np.column_stack([effects, np.zeros(200)]), y, 1e-3)
    assert weights.shape == (51,) and weights[-1] == 0 and weights[:-1].argmax() == 3
    assert ((np.column_stack([effects, np.zeros(200)]) @ weights + bias > 0) == y).all()


def test_too_few_prompts_are_told():
    known = {value.name: value for value in VALUES}
    few = [Row("a bloody baker", (), frozenset({"bloody"})), Row("a baker", (), frozenset())]
    with pytest.raises(ValueError, match="bloody: 1 prompts are for it, and it is told from 1; a fifth"):
        fit_retriever.fit_all(
            [({"file": "x", "over_trigger": 0.1}, few)], known, fit_retriever.KINDS["ngrams"], 1, None
        )
