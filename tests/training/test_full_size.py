"""Stable Diffusion 1.5 and 2.1, and the UNet of XL, at their published sizes, against PyTorch in float32.

Weights are random.

export XLA_FLAGS=--xla_backend_optimization_level=3    # as users compile
pytest -m slow tests/training/test_full_size.py -k sd15    # about 9 minutes on 2 cores, 14 GiB
pytest -m slow tests/training/test_full_size.py -k sd21    # about 9 minutes, 23 GiB: both sides' weights and optimizers
pytest -m slow tests/training/test_full_size.py -k xl      # 4 minutes
"""

import gc
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from livo_jax import StableDiffusion
from livo_jax.files.modules import load_module
from livo_jax.models.unet import UNet2DConditionModel
from livo_jax.training.batch import Batch
from tests.conftest import parts_of, randomised, relative_error
from tests.small_run import ROOT
from tests.training.test_train import compare_training, torch_training

pytestmark = pytest.mark.slow

UNET = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
TEXT = dict(
    vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    max_position_embeddings=77, hidden_act="quick_gelu", bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
)  # fmt: skip
VAE = dict(
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
)  # fmt: skip
SCHEDULER = {
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "clip_sample": False,
}  # fmt: skip
MODELS = {  # what differs from these: UNet, text encoder, scheduler; published numbers of parameters
    "sd15": ({}, {}, {}, dict(unet=859_520_964, text_encoder=123_060_480, vae=83_653_863)),
    "sd21": (
        dict(
            sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True,
            upcast_attention=True,
        ),
        dict(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
            hidden_act="gelu", pad_token_id=0,
        ),
        dict(prediction_type="v_prediction", _class_name="DDIMScheduler"),
        dict(unet=865_910_724, text_encoder=340_387_840, vae=83_653_863),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def both(request, tokenizer_dir, tmp_path_factory):
    """PyTorch's models, and ours loaded from what they saved."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet, text, scheduler, sizes = MODELS[request.param]
    theirs = dict(
        unet=randomised(diffusers.UNet2DConditionModel(**UNET | unet)).requires_grad_(False),
        vae=randomised(diffusers.AutoencoderKL(**VAE)).requires_grad_(False),
        text_encoder=randomised(CLIPTextModel(CLIPTextConfig(**TEXT | text))),
    )
    assert {name: sum(p.numel() for p in module.parameters()) for name, module in theirs.items()} == sizes
    root = tmp_path_factory.mktemp(request.param)
    for name, module in theirs.items():
        module.save_pretrained(root / name)
    shutil.copytree(tokenizer_dir, root / "tokenizer")
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER | scheduler))
    yield theirs, StableDiffusion.from_pretrained(root), root
    shutil.rmtree(root)
    jax.clear_caches()
    gc.collect()


def last(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


@torch.no_grad()
def test_forward_passes(both):
    """Each part at 512 px, float32; and how far bfloat16 is from it."""
    theirs, ours, root = both
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 49406, (1, 77))
    ids[:, 0], ids[:, 20:] = 49406, 49407
    text, out = theirs["text_encoder"](torch.tensor(ids)), ours.text_encoder(ids)
    assert relative_error(out.last_hidden_state, text.last_hidden_state) < 1e-4
    assert relative_error(out.pooled, text.pooler_output) < 1e-4

    z, t, cond = torch.randn(1, 4, 64, 64), torch.tensor([601]), text.last_hidden_state
    expected = last(theirs["unet"](z, t, cond).sample)
    step = jax.jit(lambda unet, z: unet(z, t.numpy(), cond.numpy()))
    assert relative_error(step(ours.unet, last(z)), expected) < 1e-4

    image = torch.rand(1, 3, 512, 512) * 2 - 1
    posterior = theirs["vae"].encode(image).latent_dist
    mean, logvar = jax.jit(lambda vae, x: vae.encode(x))(ours.vae, last(image))
    assert relative_error(mean, last(posterior.mean)) < 1e-4
    assert relative_error(logvar, last(posterior.logvar)) < 1e-4
    decoded = jax.jit(lambda vae, z: vae.decode(z))(ours.vae, last(posterior.mean))
    assert relative_error(decoded, last(theirs["vae"].decode(posterior.mean).sample)) < 1e-4

    half = StableDiffusion.from_pretrained(root, jnp.bfloat16)

    def rms(x):
        return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))

    deviation = rms(np.asarray(step(half.unet, last(z)), np.float32) - expected) / rms(expected)
    print(f"{root.name}: UNet in bfloat16 deviates by {deviation:.4f} of its output (root mean square)")
    assert deviation < 0.05


def test_three_livo_steps(both):
    """Loss, gradients and updated parameters; 64 px, where a step fits this machine's memory."""
    theirs, ours, _ = both
    rng = np.random.default_rng(1)
    columns = {name: rng.uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32) for name in ("aligned", "violating")}
    for name in ("prompt_ids", "value_prompt_ids"):
        ids = rng.integers(0, 49406, (2, 77)).astype(np.int32)
        ids[:, 0], ids[:, 20:] = 49406, 49407
        columns[name] = ids
    batch = Batch(**columns)
    networks, frozen = parts_of(ours)
    expected = torch_training(theirs, batch, ours.scheduler_config)
    theirs.clear()  # for memory
    compare_training(expected, networks, frozen, batch)


@torch.no_grad()
def test_the_unet_of_xl(tmp_path):
    """One pass at 1024 px. PyTorch's is let go before ours is loaded."""
    import diffusers

    torch.manual_seed(0)
    config = json.loads((ROOT / "benchmarks/sdxl/unet/config.json").read_text())
    theirs = diffusers.UNet2DConditionModel.from_config(config)
    assert sum(p.numel() for p in randomised(theirs).parameters()) == 2_567_463_684
    z, t, cond = torch.randn(1, 4, 128, 128), torch.tensor([601]), torch.randn(1, 77, 2048)
    text_embeds, time_ids = torch.randn(1, 1280), torch.tensor([[1024, 1024, 0, 0, 1024, 1024]])
    expected = last(theirs(z, t, cond, added_cond_kwargs=dict(text_embeds=text_embeds, time_ids=time_ids)).sample)
    theirs.save_pretrained(tmp_path, max_shard_size="20GB")
    del theirs
    gc.collect()
    ours = load_module(UNet2DConditionModel, tmp_path)
    step = jax.jit(lambda unet, *args: unet(*args[:3], None, *args[3:]))
    given = (x.numpy() for x in (t, cond, text_embeds, time_ids[0]))
    assert relative_error(step(ours, last(z), *given), expected) < 1e-4
