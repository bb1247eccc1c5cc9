"""The sampler as users call it: the published pipeline's numbers, and images that depend on their request alone."""

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from livo_jax import ValueEncoder, generate, sharding
from livo_jax.generate import Request
from livo_jax.values import text_hash

SETTINGS = dict(steps=4, guidance_scale=3.0, batch_size=8)
VALUE = "shape equality"


@pytest.fixture(scope="module")
def value_encoder(published):
    return ValueEncoder.from_pretrained(published / "text_encoder")


@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++"])
def test_images_are_the_published_pipelines(sd, published, torch_models, sampler):
    """The whole way, tokens to pixels, against diffusers' StableDiffusionPipeline from the same noise."""
    import diffusers
    from transformers import CLIPTokenizer

    scheduler = {"ddim": diffusers.DDIMScheduler, "dpmsolver++": diffusers.DPMSolverMultistepScheduler}[sampler]
    pipeline = diffusers.StableDiffusionPipeline(
        **torch_models, tokenizer=CLIPTokenizer.from_pretrained(published / "tokenizer"),
        scheduler=scheduler.from_config(sd.scheduler_config), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a photo of a baker", "a cook at work"]
    noise = np.stack([generate.initial_noise(5, text_hash(p), 0, (16, 16, 4)) for p in prompts])
    theirs = pipeline(
        prompts, num_inference_steps=6, guidance_scale=3.0, latents=torch.tensor(noise.transpose(0, 3, 1, 2)),
        output_type="np",
    ).images  # fmt: skip
    ours = sd.generate(prompts, seed=5, steps=6, guidance_scale=3.0, sampler=sampler)
    assert ours.shape == (2, 128, 128, 3) and ours.dtype == np.uint8
    assert np.abs(ours - theirs * 255).max() < 1.0, "equal but for rounding to bytes"


def test_an_image_depends_on_its_request_alone(sd, value_encoder):
    requests = [Request(p, i, v) for p in ("a baker", "a cook") for i in range(3) for v in (None, VALUE)]
    images = generate.generate(sd, requests, value_encoder, **SETTINGS)
    assert len({image.tobytes() for image in images}) == len(requests)
    for order, batch_size in ((slice(None, None, -1), 8), (slice(2, 7), 16)):
        again = generate.generate(sd, requests[order], value_encoder, **SETTINGS | {"batch_size": batch_size})
        assert np.abs(images[order].astype(int) - again).max() <= 1
    alone = generate.generate(sd, requests, value_encoder, **SETTINGS, mesh=sharding.make_mesh(1))
    assert np.abs(images.astype(int) - alone).max() <= 1
    other_seed = generate.generate(sd, requests[:2], value_encoder, seed=1, **SETTINGS)
    assert np.abs(images[:2].astype(int) - other_seed).max() > 1


def test_images_without_a_value_are_the_bases(sd, value_encoder):
    """The masked value token: 78 tokens give what 77 gave."""
    requests = [Request("a baker", i) for i in range(4)]
    base = generate.generate(sd, requests, **SETTINGS)
    mixed = generate.generate(sd, requests + [Request("a baker", 0, VALUE)], value_encoder, **SETTINGS)
    assert np.abs(base.astype(int) - mixed[:4]).max() <= 1
    assert np.abs(mixed[4].astype(int) - base[0]).max() > 1


def test_the_negative_prompt_and_the_noise_of_another(sd):
    plain, negative, borrowed, lender = generate.generate(
        sd,
        [
            Request("a baker"),
            Request("a baker", negative="a cook"),
            Request("a baker", noise="a cook"),
            Request("a cook"),
        ],
        **SETTINGS,
    )
    assert np.abs(plain.astype(int) - negative).max() > 1
    assert np.abs(plain.astype(int) - borrowed).max() > 1
    unguided = SETTINGS | {"guidance_scale": 0.0}  # the prompt has no say: noise and negative prompt decide
    a, b = generate.generate(sd, [Request("a baker", noise="a cook"), Request("a cook")], **unguided)
    assert np.abs(a.astype(int) - b).max() <= 1


def test_requests_number_the_images_of_a_prompt():
    assert generate.requests_of(["a", "b", "a"], VALUE) == [
        Request("a", 0, VALUE),
        Request("b", 0, VALUE),
        Request("a", 1, VALUE),
    ]
    assert generate.requests_of(["a", "b"], [None, VALUE]) == [Request("a"), Request("b", 0, VALUE)]
    with pytest.raises(ValueError, match="3 values for 2 prompts"):
        generate.requests_of(["a", "b"], [VALUE] * 3)


def test_noise_is_normal_and_its_keys_differ():
    indices = np.arange(50, dtype=np.uint32)
    noise = np.array(jax.vmap(lambda i: generate.initial_noise(0, text_hash("a"), i, (8, 8, 4)))(indices))
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert len({n.tobytes() for n in noise}) == 50


def test_what_cannot_be_drawn_is_said(sd, value_encoder):
    with pytest.raises(ValueError, match="no images"):
        generate.generate(sd, [])
    with pytest.raises(ValueError, match="'shape equality' is asked for without a value encoder"):
        sd.generate(["a baker"], values=VALUE)
    with pytest.raises(ValueError, match="batch_size=3 is not a multiple"):
        sd.generate(["a baker"], batch_size=3)
    with pytest.raises(ValueError, match="euler.*ddim"):
        sd.generate(["a baker"], sampler="euler-maruyama")


def test_pairs_are_written_with_their_settings(sd, value_encoder, tmp_path):
    generate.write_pairs(tmp_path, sd, value_encoder, ["a baker", "a cook"], VALUE, 2, seed=3, **SETTINGS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000_000.png", "000_001.png", "001_000.png", "001_001.png"]
    with Image.open(tmp_path / "001_001.png") as picture:
        assert picture.size == (2 * 128 + 2, 128)
        text, pixels = picture.text, np.asarray(picture)
    assert (text["prompt"], text["value"], text["index"], text["seed"], text["steps"]) == (
        "a cook",
        VALUE,
        "1",
        "3",
        "4",
    )
    base, aligned = generate.generate(
        sd, [Request("a cook", 1), Request("a cook", 1, VALUE)], value_encoder, seed=3, **SETTINGS
    )
    assert np.abs(pixels[:, :128].astype(int) - base).max() <= 1
    assert np.abs(pixels[:, 130:].astype(int) - aligned).max() <= 1
