"""A tiny random Stable Diffusion 3.5, in PyTorch and as published."""

import json
import shutil

import pytest
import torch

from livo_jax import StableDiffusion, sharding
from tests import kinds
from tests.conftest import VAE, randomised, text_model, write_pipeline

CLIP = ["transformers", "CLIPTextModelWithProjection"]
INDEX = {
    "_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.31.0", "max_sequence_length": 24,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "text_encoder": CLIP, "text_encoder_2": CLIP,
    "text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"], "tokenizer_3": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "SD3Transformer2DModel"], "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip
WITHOUT_T5 = INDEX | {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
SETTINGS = dict(steps=3, guidance_scale=3.0, batch_size=1, mesh=sharding.make_mesh(1))


def make_t5_tokenizer():
    """Of words and letters."""
    from transformers import T5TokenizerFast

    words = "a photo of baker cook at work tailor shape colour equality shape, colour, equality,".split()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -2.0) for word in words] + [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz,"]
    return T5TokenizerFast(vocab=pieces, extra_ids=0)


@pytest.fixture(scope="package")
def theirs(tokenizer_dir):
    """Random PyTorch models of a tiny Stable Diffusion 3.5, no two widths alike."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tokenizer_dir)
    base = text_model(len(tokenizer), tokenizer.eos_token_id).config.to_dict()

    def clip(**settings):
        config = transformers.CLIPTextConfig.from_dict(base | {"num_hidden_layers": 2} | settings)
        return transformers.CLIPTextModelWithProjection(config)

    t5 = transformers.T5Config(
        vocab_size=len(make_t5_tokenizer()), d_model=48, d_kv=6, d_ff=28, num_layers=1, num_heads=3,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=6, out_channels=6, num_layers=2, attention_head_dim=4, num_attention_heads=4,
        joint_attention_dim=48, caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=6,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    with torch.no_grad():  # so that a text shows in the images
        transformer.context_embedder.weight.mul_(5)
        for name, parameter in transformer.named_parameters():
            if "norm" in name and "linear" in name:
                parameter.mul_(3)
    vae = diffusers.AutoencoderKL(
        **VAE, latent_channels=6, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5, shift_factor=0.06
    )
    parts = dict(
        transformer=transformer, vae=vae, text_encoder=clip(projection_dim=6),
        text_encoder_2=clip(projection_dim=10, hidden_size=24, hidden_act="gelu"),
        text_encoder_3=transformers.T5EncoderModel(t5),
    )  # fmt: skip
    return {name: randomised(module) for name, module in parts.items()}


@pytest.fixture(scope="package")
def published(theirs, tokenizer_dir, tmp_path_factory):
    root = write_pipeline(tmp_path_factory.mktemp("sd3"), theirs, tokenizer_dir, SCHEDULER, INDEX)
    make_t5_tokenizer().save_pretrained(root / "tokenizer_3")
    file = root / "tokenizer_2" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "!"}))  # as published
    return root


@pytest.fixture(scope="package")
def sd(published):
    return StableDiffusion.from_pretrained(published)


@pytest.fixture(scope="package")
def without_t5(published, tmp_path_factory):
    """The same without T5."""
    root = tmp_path_factory.mktemp("sd3_without_t5")
    shutil.copytree(published, root, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*_3"))
    (root / "model_index.json").write_text(json.dumps(WITHOUT_T5))
    return StableDiffusion.from_pretrained(root)


@pytest.fixture(scope="package")
def config(published):
    return kinds.config_of(published)


@pytest.fixture(scope="package")
def made(sd, config):
    return kinds.make_all(sd, config)
