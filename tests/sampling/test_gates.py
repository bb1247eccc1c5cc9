"""Gates: a value takes effect where it moves the prediction far enough, and the image is the base's own elsewhere."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from livo_jax.sampling import generate
from livo_jax.sampling.requests import Dose, Request
from livo_jax.value_encoders import gates
from livo_jax.value_encoders.gates import Gate
from tests.sampling.conftest import DOSE, OTHER, SETTINGS, VALUE

OPEN, SHUT = Gate((0.0, 999.0), (0.0, 0.0)), Gate((0.0, 999.0), (np.inf, np.inf))
AT_LAST = Gate((499.0, 501.0), (0.0, 1e9))  # open in the second half of the steps


@pytest.fixture
def draw(sd, value_encoder, monkeypatch):
    """draw(doses of each image, gates) -> images of one prompt and noise."""

    def draw(doses, gates=None):
        monkeypatch.setattr(value_encoder, "gates", tuple((gates or {}).items()))
        requests = [Request("a baker", 0, given) for given in doses]
        return generate.generate(sd, requests, value_encoder, gated=gates is not None, **SETTINGS).astype(int)

    return draw


def test_an_open_gate_is_none_and_a_shut_one_leaves_the_base(draw):
    both = (Dose(VALUE), Dose(OTHER, 0.5))
    base, value, other, two = draw([(), DOSE, both[1:], both])
    named = (Dose(f"{VALUE}: round"),)
    gated = draw([(), DOSE, both[1:], both, named], {VALUE: OPEN, OTHER: SHUT})
    for image, expected in zip(gated, (base, value, base, value)):
        assert np.abs(image - expected).max() <= 1
    assert min(np.abs(value - base).max(), np.abs(other - base).max(), np.abs(two - value).max()) > 1
    assert np.abs(gated[4] - draw([named])[0]).max() <= 1, "an attribute has its value's gate"


def test_a_gate_is_of_each_step(draw):
    base, value = draw([(), DOSE])
    (late,) = draw([DOSE], {VALUE: AT_LAST})
    assert 0 < np.abs(late - base).mean() < np.abs(value - base).mean()


def test_a_gate_opens_at_its_least_effect():
    """Between its timesteps the least effect lies between theirs."""
    prompt, moved = jnp.zeros((2, 4, 4, 1)), jnp.zeros((2, 4, 4, 1)).at[0].set(3.0).at[1, :2].set(-4.0)
    table = gates.gates_table([["a"], ["a: b"]], {"a": Gate((0.0, 10.0), (2.8, 3.8))}, 2)
    assert table.shape == (2, 2, 2, 2)
    for t, expected in ((0.0, [1, 1]), (1.0, [1, 0]), (2.5, [0, 0])):
        found = gates.shut(jnp.ones((2, 2)), prompt, [moved, moved], table, t)
        assert found[:, 0].tolist() == expected and found[:, 1].tolist() == [1, 1], "a place without a value has none"


def test_gates_are_read_by_name():
    """Libraries sort what they write anew."""
    found = (("a", Gate((50.0, 950.0), (0.1, 0.2))),)
    assert gates.from_json(json.loads(json.dumps(gates.as_json(found), sort_keys=True))) == found
    assert gates.from_json(None) == ()


def test_values_without_a_gate_are_refused(draw, sd, value_encoder):
    with pytest.raises(ValueError, match=f"gated=True: .* no gate for '{OTHER}': .* config.sampling.gated=True"):
        draw([DOSE, (Dose(OTHER),)], {VALUE: OPEN})
    with pytest.raises(ValueError, match="prompt_layout='official': the base's images"):
        requests = [Request("a baker", 0, DOSE)]
        generate.generate(sd, requests, value_encoder, gated=True, prompt_layout="official", **SETTINGS)
