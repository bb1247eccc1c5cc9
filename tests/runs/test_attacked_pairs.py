"""What attacks found, as pairs of the next training."""

import json

import pytest

from configs import tiny
from livo_jax import StableDiffusion, sharding, values
from livo_jax.data.preferences import Preferences
from livo_jax.runs import attacked_pairs, build_preferences

(BLOODY,) = values.load(("bloody",))


@pytest.fixture
def config(monkeypatch):
    """Of two pairs of each scene, on one device."""
    monkeypatch.setattr(sharding, "make_local_mesh", lambda: sharding.make_mesh(1))
    config = tiny.get_config("smoke")
    config.principles, config.sampling.steps, config.sampling.batch_size = ("bloody",), 6, 16
    return config


def found_row(tokenizer, words, subject, **other):
    """A row of an attack's file."""
    row = dict(
        search="coordinate", value=BLOODY.statement, method="livo", subject=subject, prompt=f"a photo of a {subject}"
    )
    return row | {"tokens": tokenizer(words, add_special_tokens=False)["input_ids"]} | other


def test_what_an_attack_found_takes_turns_with_the_other_pairs(config, tmp_path):
    """Under the attacked prompt: the base's image of it, and from the same noise that of the prompt without words."""
    config.preferences.attacks, config.preferences.harm_pairs_per_scene = (str(tmp_path / "found.json"),), 6
    sd = StableDiffusion.from_pretrained(config.model)
    rows = [
        found_row(sd.tokenizer, words, subject)
        for words, subject in (
            ("bloody massacre", "cook"), ("green hat", "cook"), ("bloody baker", "cook"), ("bloody gory", "baker"),
        )
    ]  # fmt: skip
    (tmp_path / "found.json").write_text(json.dumps(rows))
    build_preferences.build(config, tmp_path / "pairs", sd)
    preferences = Preferences(tmp_path / "pairs")
    prompts = {
        block.scene: [preferences.source[block.start + i] for i in range(block.count)] for block in preferences.blocks
    }
    attacked, *others = [r for r in prompts["cook"] if r["prompt"] == b"bloody massacre a photo of a cook"]
    assert not others and len(prompts["cook"]) == 6 and not any(b"massacre" in r["prompt"] for r in prompts["butcher"])
    assert not any(b"green" in r["prompt"] for r in prompts["cook"]), "though its harmless image is kept"
    provenance = json.loads(attacked["provenance"])
    assert provenance["aligned"]["prompt"] == "a photo of a cook"
    assert provenance["aligned"]["noise"] == provenance["violating"]["prompt"] == "bloody massacre a photo of a cook"
    lines = [json.loads(line) for line in (tmp_path / "pairs" / "audit.jsonl").read_text().splitlines()]
    dropped = {(line["prompt"], line["side"]): line["dropped"] for line in lines if line["attacked"]}
    assert "not harmful" in dropped["green hat a photo of a cook", "violating"], "which draws no blood"
    assert not any("baker" in prompt for prompt, _ in dropped), "it is held out"
    (tmp_path / "found.json").write_text(json.dumps(rows[:1]))
    with pytest.raises(FileExistsError, match="config.preferences.attacks"):
        build_preferences.build(config, tmp_path / "pairs", sd)


def test_what_is_no_finding_of_an_attack_is_refused(config, tmp_path):
    tokenizer = StableDiffusion.from_pretrained(config.model).tokenizer
    row = found_row(tokenizer, "gory", "baker")
    wrong = {
        "no": "{", "empty": "[]", "row": json.dumps([row, row | {"tokens": ["gory"]}]),
        "old": json.dumps([{name: x for name, x in row.items() if name != "subject"}]),
    }  # fmt: skip
    for name, text in wrong.items():
        (tmp_path / name).write_text(text)
    config.preferences.attacks = tuple(str(tmp_path / name) for name in (*wrong, "absent"))
    with pytest.raises(ValueError) as error:
        build_preferences.build(config, tmp_path / "pairs")
    told = str(error.value)
    for part in (
        "no cannot be read",
        "empty has no list",
        "row: row 1 is not",
        "old: row 0 is not",
        "absent cannot be",
    ):
        assert part in told, told
    there = {(BLOODY.statement, "cook")}
    with pytest.raises(ValueError, match="all 1 prompts are .*splits="):
        attacked_pairs.attacked_prompts([row], there, config, tokenizer)
    with pytest.raises(ValueError, match="has the token 99999: it is of another model"):
        attacked_pairs.attacked_prompts([row | {"tokens": [99999]}], there, config, tokenizer)
    assert attacked_pairs.attacked_prompts([], there, config, tokenizer) == {}
