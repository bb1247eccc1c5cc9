"""What is exported is what was trained, bit for bit in transformers, and whole wherever it is copied to."""

import functools
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch

from livo_jax import ValueEncoder, sharding, value_encoders
from livo_jax.export.export import export, name_base
from livo_jax.models.weights import split
from tests.export.conftest import BLOODY, VALUE
from tests.files.test_modules import hub_of, run_beside

ROOT = pathlib.Path(__file__).parents[2]


def test_transformers_computes_the_same(sd, value_encoder, exported):
    from safetensors.numpy import load_file
    from transformers import CLIPTextModel, CLIPTokenizer

    assert all(name.startswith("text_model.") for name in load_file(exported / "value_encoder" / "model.safetensors"))
    texts = [f"{VALUE}, a photo of a {word}" for word in ("baker", "cook")]
    theirs, tokenizer = (
        cls.from_pretrained(exported / name)
        for cls, name in ((CLIPTextModel, "value_encoder"), (CLIPTokenizer, "tokenizer"))
    )
    ids = tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    np.testing.assert_array_equal(ids.numpy(), sd.tokenize(texts))
    with torch.no_grad():
        pooled = theirs(ids).pooler_output
    np.testing.assert_allclose(pooled, value_encoder(ids.numpy()).pooled, rtol=1e-4, atol=1e-5)


def test_another_base_is_warned_of(sd, config, exported, monkeypatch):
    """A value encoder of kind full knows its base, too; on it nothing is said."""
    config = config.copy_and_resolve_references()
    config.value_encoder.start = str(exported)
    start = functools.partial(value_encoders.start, config, sd, sharding.make_mesh())
    start()
    ValueEncoder.from_pretrained(sd.root / "text_encoder", sd=sd)
    monkeypatch.setattr(sd, "name", "another/model")
    start()  # called otherwise, in the same place
    monkeypatch.setattr(sd, "root", sd.root.parent)
    with pytest.warns(
        UserWarning, match=f"livo was trained on '{name_base(config.model)}' and is used on 'another/model'"
    ):
        start()


def test_an_export_of_the_old_dealing_says_so(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "old")
    ValueEncoder.from_pretrained(tmp_path / "old")
    file = tmp_path / "old" / "value_encoder" / "config.json"
    published = json.loads(file.read_text())
    del published["livo"]["dealing"]
    file.write_text(json.dumps(published))
    with pytest.warns(UserWarning, match="old was exported by a livo_jax that dealt .*: export the run again"):
        ValueEncoder.from_pretrained(tmp_path / "old")


def test_round_trip_is_bit_exact(value_encoder, exported, tmp_path):
    """JAX -> PyTorch -> JAX, and what PyTorch itself saves."""
    from transformers import CLIPTextModel

    CLIPTextModel.from_pretrained(exported, subfolder="value_encoder").save_pretrained(tmp_path)
    for place in (exported, tmp_path):
        jax.tree.map(
            np.testing.assert_array_equal, split(ValueEncoder.from_pretrained(place))[1], split(value_encoder)[1]
        )


def test_an_export_needs_pytorch_alone_and_loads_from_anywhere(exported, published, tmp_path):
    """From a folder that was moved, and from a hub by its id; without JAX, this package, and what they bring."""
    for file in exported.rglob("*"):
        if file.suffix in (".py", ".md", ".json"):
            text = file.read_text()
            assert str(exported.parent) not in text and str(pathlib.Path(published).resolve()) not in text, file
    moved = shutil.copytree(exported, tmp_path / "moved")
    load = f"""
import sys
for name in ("jax", "flax", "livo_jax", "scipy", "grain", "ml_collections", "bm25s", "openai"):
    sys.modules[name] = None  # an import of it fails
from diffusers import DiffusionPipeline
for place in ({str(moved)!r}, "owner/model"):
    pipe = DiffusionPipeline.from_pretrained(
        {str(published)!r}, custom_pipeline=place, trust_remote_code=True, safety_checker=None
    )
    print(type(pipe.value_encoder).__name__)
    print(pipe("a bloody baker", "auto", strength=0.5, num_inference_steps=1).applied[0][0].reason)
"""
    with hub_of(moved) as hub:
        answer = run_beside(hub, tmp_path / "home", load)
    assert answer.stdout == 2 * "CLIPTextModel\nkeywords: it says 'bloody'\n", answer.stderr


def test_the_card_says_how_and_what(exported, config):
    card = (exported / "README.md").read_text()
    assert "| shape equality | held out | D1 | livo | 0.125 | 0.100 to 0.200 | 150 |" in card
    assert f"| {BLOODY} | seen | S | livo | 0.500 | none | 10 |" in card
    assert f"base_model: {name_base(config.model)}" in card
    assert "from_pretrained(BASE, custom_pipeline=HERE" in card
    recipe = json.loads(card.split("```json")[1].split("```")[0])
    assert recipe["loss"]["beta"] == config.loss.beta and recipe["train"]["steps"] == config.train.steps


def test_an_export_is_whole_or_not_there(sd, value_encoder, config, tmp_path):
    """A disk that fills (here: a limit on file sizes) leaves nothing; what exists is not written over."""
    code = f"""
import resource, signal
from configs import tiny
from livo_jax import StableDiffusion, ValueEncoder
from livo_jax.export.export import export
config = tiny.get_config()
config.model = {config.model!r}
sd = StableDiffusion.from_pretrained(config.model)
ve = ValueEncoder.from_pretrained(config.model, subfolder="text_encoder")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
export({str(tmp_path / "out")!r}, sd, ve, config)
"""
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode != 0 and "File too large" in answer.stderr, answer.stderr
    assert not list(tmp_path.iterdir())
    export(tmp_path / "out", sd, value_encoder, config)
    assert "was not evaluated" in (card := (tmp_path / "out" / "README.md").read_text()) and "Not trained here" in card
    with pytest.raises(FileExistsError, match="out exists: remove it"):
        export(tmp_path / "out", sd, value_encoder, config)


OTHER_TRANSFORMERS = "4.57.6"


@pytest.mark.slow
def test_the_older_transformers_agrees(value_encoder, sd, exported, tmp_path):
    """transformers 4 in an environment of its own: it loads our export, and we load what it saves, bit for bit."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    packages = [f"transformers=={OTHER_TRANSFORMERS}", f"torch=={torch.__version__.split('+')[0]}", "numpy"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    ids = sd.tokenize([f"{VALUE}, a photo of a baker"])
    code = f"""
import torch, transformers
assert transformers.__version__ == {OTHER_TRANSFORMERS!r}
model, info = transformers.CLIPTextModel.from_pretrained(
    {str(exported / "value_encoder")!r}, output_loading_info=True
)
assert not any(info.values()), info
transformers.CLIPTokenizer.from_pretrained({str(exported / "tokenizer")!r})
model.save_pretrained({str(tmp_path / "saved")!r})
with torch.no_grad():
    print(*model(torch.tensor({ids.tolist()})).pooler_output[0].tolist())
"""
    answer = subprocess.run([python, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    pooled = np.array([float(x) for x in answer.stdout.split()])
    np.testing.assert_allclose(value_encoder(ids).pooled[0], pooled, rtol=1e-4, atol=1e-5)
    again = ValueEncoder.from_pretrained(tmp_path / "saved")
    jax.tree.map(np.testing.assert_array_equal, split(again)[1], split(value_encoder)[1])
