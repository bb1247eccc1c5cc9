"""Drawing without guidance: the prompt alone is evaluated, and what that changes."""

import warnings

import jax
import numpy as np
import pytest
import torch

from livo_jax.methods.sld import PRESETS
from livo_jax.models.unet import UNet2DConditionModel
from livo_jax.sampling import generate
from livo_jax.sampling.requests import Dose, Request
from livo_jax.values.principles import text_hash
from tests.sampling.conftest import DOSE, OTHER, SETTINGS, VALUE
from tests.sampling.test_generate import published_pipeline

UNGUIDED = SETTINGS | {"guidance_scale": 1.0}


def evaluated_rows(monkeypatch) -> list[int]:
    """Grows by the rows of each evaluation of the UNet that is traced, a step's."""
    found, call = [], UNet2DConditionModel.__call__

    def counted(self, z, *args, **kw):
        found.append(len(z))
        return call(self, z, *args, **kw)

    monkeypatch.setattr(UNet2DConditionModel, "__call__", counted)
    jax.clear_caches()
    return found


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_without_guidance_the_prompt_alone_is_evaluated(sd, published, torch_models, scale, monkeypatch):
    """As by diffusers' pipeline: half of the rows, half of the operations of a step, and the negative prompt unread."""
    pipeline = published_pipeline(sd, published, torch_models, "DDIMScheduler")
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a photo of a baker", "a cook at work"]
    noise = np.stack([generate.initial_noise(5, text_hash(p), 0, sd.latent_shape) for p in prompts])
    theirs = pipeline(
        prompts, num_inference_steps=6, guidance_scale=scale, latents=torch.tensor(noise.transpose(0, 3, 1, 2)),
        output_type="np",
    ).images  # fmt: skip
    rows, drawn = evaluated_rows(monkeypatch), {}
    settings = SETTINGS | dict(sampler="ddim", steps=6, batch_size=2, seed=5)
    for guidance_scale in (scale, 3.0):
        drawn[guidance_scale] = sd.generate(prompts, **settings | {"guidance_scale": guidance_scale})
    assert np.abs(drawn[scale] - theirs * 255).max() < 1.0, "equal but for rounding to bytes"
    assert np.abs(drawn[scale].astype(int) - drawn[3.0]).max() > 1
    assert rows == [2, 4]


def test_a_step_without_guidance_costs_half(sd, monkeypatch):
    """Counted by XLA in the compiled program, whose loop over the steps it counts once, less the decoder's."""
    flops, sample = [], generate._sample

    def counted(*args, **kw):
        compiled = sample.lower(*args, **kw).compile()
        flops.append(compiled.cost_analysis()["flops"])
        return compiled(*args[1:])  # all but what is static

    monkeypatch.setattr(generate, "_sample", counted)
    for scale in (3.0, 1.0):
        sd.generate(["a baker"], **SETTINGS | {"guidance_scale": scale})
    decoder = jax.jit(lambda z: generate.decode(z, sd.vae, 1)).lower(np.zeros((1, *sd.latent_shape), np.float32))
    guided, unguided = np.array(flops) - decoder.compile().cost_analysis()["flops"]
    assert 0.45 < unguided / guided < 0.55


def test_requests_with_and_without_guidance_in_one_call(sd, value_encoder, monkeypatch):
    """Each is the image of a call of its own, with values of every strength; a strength is a dial without guidance."""
    doses = ((), DOSE, (Dose(VALUE, 0.5), Dose(OTHER)), (Dose(VALUE, 1 - 1e-6),))
    requests = [Request("a baker", 0, of_one, guidance_scale=scale) for scale in (0.5, 1.0, 3.0) for of_one in doses]
    mixed = generate.generate(sd, requests, value_encoder, **SETTINGS).astype(int)
    rows = evaluated_rows(monkeypatch)
    for request, image in zip(requests, mixed):
        (alone,) = generate.generate(sd, [request], value_encoder, **SETTINGS)
        assert np.abs(image - alone).max() <= 1, request
    below, at, guided = mixed.reshape(3, 4, *mixed.shape[1:])
    np.testing.assert_array_equal(below, at)
    assert (np.abs(at - guided).max((1, 2, 3)) > 1).all()
    assert np.abs(at[1] - at[3]).max() <= 1 < np.abs(at[1] - at[0]).max()
    assert rows[:4] == [1, 1, 2, 2], "of the first four: a strength costs a row, as with guidance"


def test_the_official_layout_without_guidance(sd, published, torch_models, value_encoder):
    """The value token and the prompt's own tokens, as unpadded PyTorch."""
    prompt, tokenizer, text = "a photo of a baker", sd.tokenizer, torch_models["text_encoder"]
    with torch.no_grad():
        u = text(tokenizer(f"{VALUE}, {prompt}", return_tensors="pt").input_ids).pooler_output
        c = text(tokenizer(prompt, return_tensors="pt").input_ids).last_hidden_state
    pipeline = published_pipeline(sd, published, torch_models, "DDIMScheduler")
    pipeline.set_progress_bar_config(disable=True)
    noise = np.array(generate.initial_noise(0, text_hash(prompt), 0, sd.latent_shape))
    theirs = pipeline(
        prompt_embeds=torch.cat([u[:, None], c], dim=1), num_inference_steps=4, guidance_scale=1.0,
        latents=torch.tensor(noise).permute(2, 0, 1)[None], output_type="np",
    ).images  # fmt: skip
    settings = UNGUIDED | {"sampler": "ddim", "prompt_layout": "official"}
    (ours,) = generate.generate(sd, [Request(prompt, 0, DOSE)], value_encoder, **settings)
    assert np.abs(ours - theirs[0] * 255).max() < 1.0


def test_guidance_that_cannot_be_is_told(sd, monkeypatch):
    edits = (("bloody", 1.0),)
    with pytest.raises(ValueError, match="guidance_scale=nan: choose a finite number; at most 1 is no guidance"):
        sd.generate(["a baker"], **SETTINGS | {"guidance_scale": float("nan")})
    requests = [Request("a cook", edits=edits), Request("a baker", edits=edits, guidance_scale=1.0)]
    with pytest.raises(ValueError, match="guidance_scale=1.0 of prompt 'a baker': SafeGuidance edits .*above 1"):
        generate.generate(sd, requests, **SETTINGS, guidance=PRESETS["medium"])
    with pytest.warns(UserWarning, match="negative prompt 'a cook': without guidance it has no say"):
        with_negative = generate.generate(sd, [Request("a baker", negative="a cook")], **UNGUIDED)
    np.testing.assert_array_equal(with_negative, sd.generate(["a baker"], **UNGUIDED))
    monkeypatch.setattr(sd, "guidance_distilled", True)
    with pytest.warns(UserWarning, match="guidance_scale=3.0: .* is made for no guidance; choose at most 1"):
        sd.generate(["a baker"], **SETTINGS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd.generate(["a baker"], **UNGUIDED)
