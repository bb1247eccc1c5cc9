"""A tiny random Stable Diffusion XL, in PyTorch and as published."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from livo_jax import StableDiffusion, sharding
from tests import kinds
from tests.conftest import LEVELS, UNET, VAE, randomised, text_model, write_pipeline

INDEX = {
    "_class_name": "StableDiffusionXLPipeline", "_diffusers_version": "0.27.0", "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1,
    "beta_schedule": "scaled_linear", "timestep_spacing": "leading",
}  # fmt: skip
SETTINGS = dict(steps=3, guidance_scale=3.0, sampler="euler", batch_size=1, mesh=sharding.make_mesh(1))


@pytest.fixture(scope="package")
def theirs(tokenizer_dir):
    """Random PyTorch models of a tiny Stable Diffusion XL, no two widths alike."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tokenizer_dir)
    one = text_model(len(tokenizer), tokenizer.eos_token_id)
    settings = {
        **one.config.to_dict(),
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "projection_dim": 10,
        "pad_token_id": 0,
    }
    two = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig.from_dict(settings))
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, cross_attention_dim=44, attention_head_dim=(1, 2), transformer_layers_per_block=(1, 2), **LEVELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=6,
        projection_class_embeddings_input_dim=46,
    )  # fmt: skip
    parts = dict(unet=unet, vae=diffusers.AutoencoderKL(**VAE), text_encoder=one, text_encoder_2=two)
    return {name: randomised(module) for name, module in parts.items()}


@pytest.fixture(scope="package")
def published(theirs, tokenizer_dir, tmp_path_factory):
    root = write_pipeline(tmp_path_factory.mktemp("sdxl"), theirs, tokenizer_dir, SCHEDULER, INDEX)
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):  # as published
        file = root / name / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": pad}))
    return root


@pytest.fixture(scope="package")
def sd(published):
    return StableDiffusion.from_pretrained(published)


@pytest.fixture(scope="package")
def small_sd15(theirs, published, tmp_path_factory):
    """A Stable Diffusion 1.x with the same first text encoder."""
    import diffusers

    root = tmp_path_factory.mktemp("sd15")
    shutil.copytree(published, root, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*_2"))
    (root / "model_index.json").write_text(json.dumps(INDEX | {"text_encoder_2": [None, None]}))
    diffusers.UNet2DConditionModel(**UNET).save_pretrained(root / "unet")
    return StableDiffusion.from_pretrained(root)


@pytest.fixture(scope="package")
def config(published):
    return kinds.config_of(published)


class Towers(torch.nn.Module):
    """Two text encoders in PyTorch, called as one with ids [B, 2, L]."""

    def __init__(self, one, two):
        super().__init__()
        self.text_encoder, self.text_encoder_2 = one, two

    def forward(self, ids):
        outs = [tower(x, output_hidden_states=True) for tower, x in zip(self.children(), ids.unbind(1))]
        end = (ids == self.text_encoder.config.eos_token_id).int().argmax(-1)  # [B, 2]
        rows = torch.arange(len(ids))
        return SimpleNamespace(
            last_hidden_state=torch.cat([out.hidden_states[-2] for out in outs], dim=-1),
            pooler_output=torch.cat([out.last_hidden_state[rows, e] for out, e in zip(outs, end.T)], dim=-1),
            text_embeds=outs[1].text_embeds,
        )


@pytest.fixture(scope="package")
def made(sd, config):
    return kinds.make_all(sd, config)
