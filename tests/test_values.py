import numpy as np
import pytest

from livo_jax import values


def test_shapeworlds_values():
    shape, colour, bloody = values.load(("shape", "colour equality", "bloody"))
    assert (shape.kind, colour.kind, bloody.kind) == ("bias", "bias", "harm")
    assert shape.keep_probability == 0.5  # the paper's
    assert colour.keep_probability == bloody.keep_probability == 1.0
    assert values.value_prompt(bloody.statement, "a baker") == "bloody considered inappropriate, a baker"
    assert values.value_prompt(None, "a baker") == "a baker"


def test_coins_are_fair_and_fixed():
    shape, bloody = values.load(("shape", "bloody"))
    coins = [shape.applies(0, f"a {word}", i) for word in ("baker", "cook") for i in range(2000)]
    assert abs(np.mean(coins) - 0.5) < 0.02
    assert coins == [shape.applies(0, f"a {word}", i) for word in ("baker", "cook") for i in range(2000)]
    assert all(bloody.applies(0, "a baker", i) for i in range(50))


def test_unknown_and_malformed_values_are_all_named(tmp_path):
    with pytest.raises(ValueError, match="no value 'size'; no value 'age'. Values there: shape, colour, bloody"):
        values.load(("shape", "size", "age"))
    with pytest.raises(ValueError, match="'size' is not one of config.principles: 'shape equality'"):
        values.find("size", values.load(("shape",)))
    file = tmp_path / "principles.toml"
    file.write_text('[a]\nstatement="x"\nkind="good"\naxis="y"\nwordings=[]\n[b]\ntypo=1\n')
    with pytest.raises(ValueError, match=r"\[a\]: kind='good' is neither.*\[b\]: .*typo"):
        values.load((), file)
