import json

import pytest
from ml_collections import ConfigDict

from livo_jax import values
from livo_jax.judges import vlm


def test_shapeworlds_values():
    shape, colour, bloody = values.load(("shape", "colour", "bloody"))
    assert (shape.kind, colour.kind, bloody.kind) == ("bias", "bias", "harm")
    assert values.load(("gender",))[0].keep_probability == 0.5  # the paper's
    assert shape.keep_probability == 0.45
    assert colour.keep_probability == bloody.keep_probability == 1.0
    assert values.value_prompt(bloody.statement, "a baker") == "bloody considered inappropriate, a baker"
    assert values.value_prompt(None, "a baker") == "a baker"


def test_articles():
    a = "man person user useful usual university unicorn uniform union European one-eyed once ukulele urologist utility"
    a += " CEO house hotel historian yak ewe ubiquitous"
    an = "actor engineer Indian optician usher umpire urban uncle utter unkind unimaginative unintelligent unidentified"
    an += " only onion elderly hour honest honorable heir"
    for article, words in (("a", a), ("an", an)):
        for word in words.split():
            assert values.phrase("a photo of a(n) {} at work", word) == f"a photo of {article} {word} at work"
    assert values.phrase("a photo of a {}", "optician") == "a photo of a optician", "as the template has it"
    assert values.phrase("a(n) {}", "nude person in an attic") == "a nude person in an attic"


def test_what_would_be_read_as_another_value_is_refused(tmp_path):
    """Results, tokens and commands go by texts; a reading that nothing reaches would be R = 0."""
    file = tmp_path / "principles.toml"

    def told(*tables: dict) -> str:
        fields = dict(statement="x", kind="bias", axis="y", wordings=["{attribute} {subject}"], attributes=["p", "q"])
        lines = []
        for name, table in zip("ab", tables):
            lines += [f"[{name}]", *(f"{field} = {json.dumps(x)}" for field, x in (fields | table).items())]
        file.write_text("\n".join(lines).replace("NaN", "nan"))
        with pytest.raises(ValueError) as error:
            values.load_principles(ConfigDict({"principles": ("a", "b")[: len(tables)], "principles_file": str(file)}))
        return str(error.value)

    harm = dict(kind="harm", wordings=["gory {subject}"], attributes=[])
    for wrong in ({"harmful_from": float("nan")}, {"harmful_from": 2.0}, {"harmful_from": 0.5, "highest": 0.0}):
        assert "a harm needs the least reading" in told(harm | wrong)
    for statement in ("", " x", "x\ny"):
        assert f"statement: {statement!r} is no text on one line" in told({"statement": statement})
    assert "attributes: '' is no text" in told({"attributes": ["", "q"]})
    assert "attributes=['p', 'p']: one is there twice" in told({"attributes": ["p", "p"]})
    assert "'auto' asks for the retriever" in told({"statement": "auto"})
    assert "'x' is of [a] and [b]: reword one" in told({}, {"axis": "z"})
    assert "'x: p' is of [a] and [b]" in told({}, {"statement": "x: p"})
    assert "'a' is of [a] and [b]" in told({}, {"statement": "a"})
    with pytest.raises(ValueError, match="'shape' is asked for twice"):
        values.load(("shape", "shape"))


def test_unknown_and_malformed_values_are_all_named(tmp_path):
    with pytest.raises(
        ValueError, match="no value 'size'; no value 'age'. Values there: gender, .*shape, colour, bloody"
    ):
        values.load(("shape", "size", "age"))
    file = tmp_path / "principles.toml"
    file.write_text('statement = "age equality"\n')
    with pytest.raises(ValueError, match="statement='age equality' is of no value: it stands above the first .NAME."):
        values.load((), file)
    with pytest.raises(ValueError, match="'size' is not one of config.principles: 'shape equality'"):
        values.find("size", values.load(("shape",)))
    file.write_text('[a]\nstatement="x"\nkind="good"\naxis="y"\nwordings=[]\n[b]\ntypo=1\n')
    lacking = r"\[b\] lacks statement, kind, axis, wordings; \[b\] has typo: there are statement, .*, auto"
    with pytest.raises(ValueError, match=rf"\[a\]: kind='good' is neither.*{lacking}"):
        values.load((), file)
    table = '[{}]\nstatement="x"\nkind="{}"\naxis="y"\nwordings={}\nattributes={}\nclasses={}\nharmful_from={}\n'
    bias = table.format("a", "bias", ["{atribute} {subject}", "a {attribute}"], ["p", "q", "r"], ["x", "y"], 0)
    harm = table.format("b", "harm", [], [], ["x"], 0) + 'aligned="nothing"\nkeep_probability=5\n'
    file.write_text(bias + harm + table.format("c", "harm", '"bloody {subject}"', [], [], '"x"'))
    with pytest.raises(ValueError) as error:
        values.load((), file)
    needs = "it needs {attribute} and {subject}, each once"
    for said in (
        "[a]: 2 classes for a bias that needs 3",
        "[a]: wordings: '{atribute} {subject}' has {atribute}, {subject}, " + needs,
        "[a]: wordings: 'a {attribute}' has {attribute}, " + needs,
        "[b]: harmful_from=0, highest=1.0: a harm needs",
        "[b]: 1 classes for a harm that needs 2",
        "[b]: wordings is empty",
        "[b]: aligned: 'nothing' has no braces, it needs {subject}, each once",
        "[b]: keep_probability=5 is not 0 to 1",
        "[c]: wordings='bloody {subject}' is no list of texts",
        "[c]: harmful_from='x' is no number",
    ):
        assert said in str(error.value), said
    file.write_text("[a]\nkind = bias")
    with pytest.raises(ValueError, match=r"principles.toml: Invalid value"):
        values.load((), file)


def test_the_papers_values_can_be_judged_by_clip_and_by_a_model_that_is_asked():
    for value in values.load(("gender", "race", "nudity", "gore", "zombie")):
        assert len(set(value.classes)) == (len(value.attributes) if value.kind == "bias" else 2)
        asked = vlm.chosen(value.question, value.attributes or ("yes", "no"))
        assert value.question.endswith(".") and asked == "", "the question names them all"
        if value.kind == "harm":
            assert "yes or no" in value.question and 0 < value.harmful_from < 1
        for attribute, text in zip(value.attributes, value.classes):
            assert value.axis == "gender" or attribute in text.lower()
