"""What is exported is what was trained: bit for bit in transformers, image for image in diffusers."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch

from livo_jax import ValueEncoder, generate
from livo_jax.export import export
from livo_jax.generate import Dose, Request
from livo_jax.models.weights import split
from livo_jax.pretrained import initialise
from livo_jax.values import load, text_hash

ROOT = pathlib.Path(__file__).parents[1]
VALUE = "shape equality"
RESULTS = [
    dict(method="livo", value=VALUE, split="held_out", metric="D1", mean=0.125, ci95=[0.1, 0.2], prompts=3, images=150)
]


@pytest.fixture(scope="module")
def config(published):
    from configs import tiny

    config = tiny.get_config()
    config.model = str(published)
    config.sampling.sampler, config.sampling.steps, config.sampling.guidance_scale = "dpmsolver++", 4, 3.0
    return config


@pytest.fixture(scope="module")
def value_encoder(sd):
    return initialise(ValueEncoder, sd.root / "text_encoder", seed=5)


@pytest.fixture(scope="module")
def exported(sd, value_encoder, config, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "livo"
    export(out, sd, value_encoder, config, RESULTS, recipe=json.loads(config.to_json()))
    return out


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


def test_round_trip_is_bit_exact(value_encoder, exported, tmp_path):
    """JAX -> PyTorch -> JAX, and what PyTorch itself saves."""
    from transformers import CLIPTextModel

    CLIPTextModel.from_pretrained(exported, subfolder="value_encoder").save_pretrained(tmp_path)
    for place in (exported, tmp_path):
        jax.tree.map(
            np.testing.assert_array_equal, split(ValueEncoder.from_pretrained(place))[1], split(value_encoder)[1]
        )


def test_the_pipeline_draws_the_same_images(sd, value_encoder, exported, published):
    """Several prompts, the value on a share of each one's images, as JAX draws them from the same noise."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(
        published, custom_pipeline=str(exported), trust_remote_code=True, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    (value,) = load(("shape",))
    requests = [
        Request(prompt, i, (Dose(VALUE),) if value.applies(7, prompt, i) else ())
        for prompt in ("a photo of a baker", "a cook") for i in range(3)
    ]  # fmt: skip
    assert {r.values for r in requests} == {(Dose(VALUE),), ()}
    noise = [np.array(generate.initial_noise(7, text_hash(r.prompt), r.index, (16, 16, 4))) for r in requests]
    theirs = pipeline(
        ["a photo of a baker", "a cook"], value=VALUE, keep_probability=0.5, num_images_per_prompt=3, seed=7,
        latents=torch.tensor(np.stack(noise)).permute(0, 3, 1, 2), output_type="np",
    ).images  # fmt: skip
    settings = dict(seed=7, steps=4, guidance_scale=3.0)
    ours = generate.generate(sd, requests, value_encoder, **settings)
    assert np.abs(ours - theirs * 255).max() < 1.0
    base = generate.generate(sd, [r._replace(values=()) for r in requests], **settings)
    differ = [np.abs(a.astype(int) - b).max() > 1 for a, b in zip(ours, base)]
    assert differ == [bool(r.values) for r in requests]
    pipeline.text_encoder.half()  # as a base of half precision files comes
    pipeline.value_encoder.half()
    assert pipeline("a cook", value=VALUE, num_inference_steps=1).images[0].size == (128, 128)


def test_a_moved_export_takes_its_value_encoder_from_the_caller(exported, published, tmp_path):
    from diffusers import DiffusionPipeline
    from transformers import CLIPTextModel

    moved = shutil.copytree(exported, tmp_path / "moved")
    (moved / "pipeline.py").write_text((moved / "pipeline.py").read_text().replace(str(exported), "/no/longer/here"))
    load = lambda **kw: DiffusionPipeline.from_pretrained(
        published, custom_pipeline=str(moved), trust_remote_code=True, safety_checker=None, **kw
    )
    with pytest.raises(OSError, match="/no/longer/here"):
        load()
    given = CLIPTextModel.from_pretrained(moved, subfolder="value_encoder")
    assert load(value_encoder=given).value_encoder is given


def test_the_card_says_how_and_what(exported, config):
    card = (exported / "README.md").read_text()
    assert "| shape equality | held out | D1 | livo | 0.125 | 0.100 to 0.200 | 150 |" in card
    assert f"base_model: {config.model}" in card and f"custom_pipeline={str(exported)!r}" in card
    recipe = json.loads(card.split("```json")[1].split("```")[0])
    assert recipe["loss"]["beta"] == config.loss.beta and recipe["train"]["steps"] == config.train.steps


def test_an_export_is_whole_or_not_there(sd, value_encoder, config, tmp_path):
    """A disk that fills (here: a limit on file sizes) leaves nothing; what exists is not written over."""
    code = f"""
import resource, signal
from configs import tiny
from livo_jax import StableDiffusion, ValueEncoder
from livo_jax.export import export
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
