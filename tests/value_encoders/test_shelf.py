"""A shelf of values: by name, swapped in one compiled program, and together; a broken index is told whole."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from configs import tiny
from livo_jax import sharding, value_encoders
from livo_jax.export import export
from livo_jax.models.weights import split
from livo_jax.sampling import generate
from livo_jax.value_encoders.gates import Gate
from livo_jax.value_encoders.lora import LoRA
from livo_jax.value_encoders.shelf import Shelf
from livo_jax.value_encoders.soft_tokens import SoftTokens
from livo_jax.values.principles import load
from tests.files.test_modules import hub_of, load_from
from tests.kinds import at_once, of_kind

SETTINGS = dict(steps=2, guidance_scale=3.0, batch_size=1, mesh=sharding.make_mesh(1))
VALUES = {value.name: value.statement for value in load(("shape", "colour", "bloody"))}


def trained(value_encoder, seed: int):
    graph, params = split(value_encoder)
    rng = np.random.default_rng(seed)
    return nnx.merge(graph, jax.tree.map(lambda x: x + rng.normal(0, 0.5, x.shape).astype(np.float32), params))


@pytest.fixture(scope="module")
def encoders(sd):
    """name -> a value encoder: low-rank updates of three values, soft tokens of one."""

    def lora():
        return LoRA(sd.text_encoder, rank=2, alpha=2.0, targets=("q_proj", "fc1"), rngs=nnx.Rngs(0))

    made = {name: trained(lora(), seed) for seed, name in enumerate(VALUES)}
    statements = (VALUES["colour"], "another")
    soft = SoftTokens(sd.text_encoder.config, statements=statements, tokenizer=sd.tokenizer, count=2)
    return made | {"soft": trained(soft, 3)}


@pytest.fixture(scope="module")
def shelf_dir(sd, encoders, tmp_path_factory):
    root = tmp_path_factory.mktemp("shelf")
    index = {"base": sd.name, "values": {}}
    for name, statement in VALUES.items():
        encoders[name].save(root / name, sd.name)
        index["values"][name] = {"statement": statement, "kind": "lora", "folder": name}
    (root / "shelf.json").write_text(json.dumps(index))
    return root


def test_values_by_name_swap_without_recompiling_and_work_together(sd, encoders, shelf_dir):
    shelf = Shelf(shelf_dir, sd)

    def draw(values, value_encoder=shelf, **kw):
        return sd.generate(["a baker"], values, value_encoder, **SETTINGS, **kw)

    first = draw("shape")
    programs = generate._sample._cache_size()
    assert np.array_equal(draw("colour"), draw(VALUES["colour"], encoders["colour"]))
    assert not np.array_equal(draw("colour"), first) and generate._sample._cache_size() == programs
    assert draw("shape", strength={"shape": 0}).applied == [()]

    both = draw([["bloody", "shape"]])
    assert {dose.value for dose in both.applied[0]} == {VALUES["bloody"], VALUES["shape"]}
    programs = generate._sample._cache_size()
    other = draw([["bloody", "colour"]])
    assert generate._sample._cache_size() == programs and not np.array_equal(both, other)


def test_values_bring_their_gates(sd, shelf_dir):
    shelf, own = Shelf(shelf_dir, sd), {}
    for k, name in enumerate(("bloody", "shape")):
        own[VALUES[name]] = Gate((0.0, 999.0), (0.1 * k, 0.2))
        _, _, encoder = shelf.take([name])
        encoder.gates = ((VALUES[name], own[VALUES[name]]), ("another", Gate((0.0,), (1.0,))))
    _, _, together = shelf.take([["bloody", "shape", "colour"]])
    assert dict(together.gates) == own


def test_each_text_is_read_by_its_values_encoder(sd, encoders, shelf_dir):
    _, _, together = Shelf(shelf_dir, sd).take([["shape", "bloody"], "colour"])
    names = ["bloody", "shape", "colour", "shape"]
    ids = sd.tokenize([f"{VALUES[name]}, a baker" for name in names])
    expected = [encoders[name].tokens(ids, sd.text_encoder)[i] for i, name in enumerate(names)]
    np.testing.assert_allclose(together.tokens(ids, sd.text_encoder), expected, atol=1e-6)


def test_soft_tokens_stand_on_a_shelf(sd, encoders, shelf_dir, tmp_path):
    encoders["soft"].save(tmp_path / "soft", sd.name)
    encoders["shape"].save(tmp_path / "lora", sd.name)
    entry = {
        "colour": {"statement": VALUES["colour"], "kind": "token", "folder": "soft"},
        "shape": {"statement": VALUES["shape"], "kind": "lora", "folder": "lora"},
    }
    (tmp_path / "shelf.json").write_text(json.dumps({"base": sd.name, "values": entry}))
    shelf = Shelf(tmp_path, sd)
    values, _, value_encoder = shelf.take("colour")
    assert values == [(VALUES["colour"],)]
    ids = sd.tokenize([f"{VALUES['colour']}, a baker"])
    np.testing.assert_array_equal(value_encoder.tokens(ids), encoders["soft"].tokens(ids))

    # Beside another's two tokens, one is padded, and the padding is not seen.
    _, _, together = shelf.take([["shape", "colour"]])
    ids = sd.tokenize([f"{VALUES[name]}, a baker" for name in ("colour", "shape")])
    np.testing.assert_array_equal(together.seen(ids), [[True, True], [True, False]])
    tokens = together.tokens(ids, sd.text_encoder)
    np.testing.assert_array_equal(tokens[0], encoders["soft"].tokens(ids)[0])
    np.testing.assert_allclose(tokens[1, 0], encoders["shape"].tokens(ids, sd.text_encoder)[1, 0], atol=1e-6)
    draw = functools.partial(sd.generate, **SETTINGS)
    image = draw(["a baker", "a cook"], ["shape", "colour"], shelf)[0].astype(int)
    assert np.abs(image - draw(["a baker"], VALUES["shape"], encoders["shape"])[0]).max() <= 1


def test_exports_of_several_states_stand_on_a_shelf(sd, tmp_path):
    """Each gives as many tokens as it was trained with, and reads the prompt or not."""
    index, made = {"base": sd.name, "values": {}}, {}
    for name, states, reads_prompt in (("shape", 3, False), ("colour", 1, True)):
        config = of_kind(tiny.get_config(), "full", states=states, reads_prompt=reads_prompt)
        config.model, config.principles = str(sd.root), (name,)
        made[name] = trained(value_encoders.start(config, sd, sharding.make_mesh()), states)
        export.export(tmp_path / name, sd, made[name], config)
        index["values"][name] = {"statement": VALUES[name], "kind": "full", "folder": name}
    (tmp_path / "shelf.json").write_text(json.dumps(index))
    _, _, together = Shelf(tmp_path, sd).take([["shape", "colour"]])
    texts = [together.text(VALUES[name], "a baker") for name in made]
    assert texts == [f"{VALUES['shape']}, ", f"{VALUES['colour']}, a baker"]
    ids = sd.tokenize(texts)
    np.testing.assert_array_equal(together.seen(ids), [[True] * 3, [True, False, False]])
    tokens = at_once(together.tokens, ids, sd.text_encoder)
    for i, (encoder, count) in enumerate(zip(made.values(), (3, 1))):
        expected = at_once(encoder.tokens, ids, sd.text_encoder)[i]
        np.testing.assert_allclose(tokens[i, :count], expected, atol=1e-6)


def test_a_shelf_on_the_hub_fetches_what_it_is_asked_for(sd, encoders, shelf_dir, tmp_path):
    """By the client of the hub: of a value the files of its kind, once; nothing of the others."""
    root, index = tmp_path / "shelf", json.loads((shelf_dir / "shelf.json").read_text())
    for name in VALUES:
        encoders[name].save(root / name / "adapter", sd.name)
    encoders["soft"].save(root / "soft" / "value_encoder", sd.name)
    index["values"]["soft"] = {"statement": "another", "kind": "token", "folder": "soft"}
    shutil.copytree(sd.root / "text_encoder", root / "full" / "value_encoder")
    index["values"]["full"] = {"statement": "a third", "kind": "full", "folder": "full"}
    index["values"]["gone"] = {"statement": "a fourth", "kind": "lora", "folder": "gone"}
    for name in ("shape", "soft", "full"):  # beside them what else an export has
        (root / name / "tokenizer").mkdir()
        (root / name / "tokenizer" / "vocab.json").write_text("{}")
        (root / name / "pipeline.py").write_text("")
    (root / "shape" / "value_encoder").mkdir()
    (root / "shape" / "value_encoder" / "model.safetensors").write_bytes(b"the merged weights")
    (root / "shelf.json").write_text(json.dumps(index))
    take = f"""
from livo_jax.shelf import Shelf
shelf = Shelf("owner/model", StableDiffusion.from_pretrained({str(sd.root)!r}))
for name in %r:
    print(type(shelf.take(name)[2]).__name__)
"""
    with hub_of(root) as hub:
        fetched = hub.RequestHandlerClass.fetched
        answer = load_from(hub, tmp_path / "home", take % ["shape", "soft", "full", "gone"])
        assert answer.stdout == "LoRA\nFixed\nValueEncoder\n", answer.stderr
        assert "'a fourth' of the shelf owner/model: its folder 'gone' is not there" in answer.stderr
        assert fetched == {
            "shelf.json", *(f"shape/adapter/{file}" for file in LoRA.FILES), f"soft/value_encoder/{SoftTokens.FILE}",
            *(f"full/value_encoder/{file}" for file in ("config.json", "model.safetensors")),
        }  # fmt: skip
        fetched.clear()
        answer = load_from(hub, tmp_path / "home", take % ["full", "shape", "colour"], HF_HUB_OFFLINE="1")
        assert answer.stdout == "ValueEncoder\nLoRA\n" and not fetched, answer.stderr
        assert "'owner/model': it is not a directory here, and not in the hub's cache or not reachable" in answer.stderr


def test_a_broken_index_is_told_whole(sd, shelf_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no shelf: it has no shelf.json"):
        Shelf(tmp_path, sd)

    def entry(**changes):
        return {"statement": "s", "kind": "lora", "folder": "a"} | changes

    values = {
        "fields": {"statement": "x"}, "text": entry(statement=3), "kind": entry(statement="k", kind="dora"),
        "out": entry(statement="o", folder="../a"), "gone": entry(statement="g", folder="b"),
        "one": entry(), "twice": entry(),
    }  # fmt: skip
    (tmp_path / "a").mkdir()
    (tmp_path / "shelf.json").write_text(json.dumps({"base": None, "values": values}))
    with pytest.raises(ValueError) as error:
        Shelf(tmp_path, sd)
    for told in (
        "base=None is not the name of a model", "fields: {'statement': 'x'} must have statement, kind, folder",
        "text: statement=3 is no text", f"kind: kind='dora', choose from {', '.join(value_encoders.KINDS)}",
        "out: folder='../a' leads out of the shelf", "gone: there is no folder 'b'",
        "twice: one has the statement 's' too",
    ):  # fmt: skip
        assert told in str(error.value)
    (tmp_path / "shelf.json").write_text("{")
    with pytest.raises(ValueError, match="shelf.json is no JSON"):
        Shelf(tmp_path, sd)


def test_what_a_shelf_does_not_have(sd, shelf_dir, tmp_path):
    shelf = Shelf(shelf_dir, sd)
    with pytest.raises(ValueError, match="'age' is not on the shelf .*: there are shape, colour, bloody"):
        sd.generate(["a baker"], "age", shelf)
    with pytest.raises(ValueError, match="a shelf gives values by their names"):
        sd.generate(["a baker"], "auto", shelf)
    index = json.loads((shelf_dir / "shelf.json").read_text()) | {"base": "another/model"}
    for name in VALUES:
        (tmp_path / name).mkdir()
    (tmp_path / "shelf.json").write_text(json.dumps(index))
    with pytest.warns(UserWarning, match="trained on 'another/model' and is used on"):
        Shelf(tmp_path, sd)
