"""The frozen models compute what diffusers and transformers compute with the same published weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from livo_jax.files.modules import load_module
from livo_jax.models.clip import CLIPTextModel, CLIPTextModels, CLIPTextModelWithProjection
from livo_jax.models.unet import UNet2DConditionModel
from livo_jax.models.vae import AutoencoderKL
from livo_jax.models.weights import split
from tests.conftest import randomised, relative_error, text_model

# Four levels, as published.
WIDTHS = (8, 16, 24, 32)
UNET = dict(sample_size=16, block_out_channels=WIDTHS, norm_num_groups=4, cross_attention_dim=20, attention_head_dim=4)
VAE = dict(
    block_out_channels=WIDTHS, norm_num_groups=4, layers_per_block=2, sample_size=128,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
)  # fmt: skip

SDXL = dict(
    block_out_channels=(8, 16, 24), down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",), transformer_layers_per_block=(1, 2, 3),
    attention_head_dim=(1, 2, 3), use_linear_projection=True, addition_embed_type="text_time",
    addition_time_embed_dim=6, projection_class_embeddings_input_dim=46,
)  # fmt: skip


def last(x):
    """PyTorch's channels-first to our channels-last."""
    return np.moveaxis(x.detach().numpy(), 1, -1)


def compute(module, *args, method="__call__", **kw):
    """What a module computes, as one compiled program."""
    graph, params = split(module)

    def call(params, args, kw):
        return getattr(nnx.merge(graph, params), method)(*args, **kw)

    return jax.jit(call)(params, args, kw)


@pytest.mark.parametrize(
    "settings",
    [
        {},  # SD 1.x: convolutional projections, one number of heads
        dict(use_linear_projection=True, attention_head_dim=(1, 2, 3, 4), layers_per_block=(1, 2, 1, 2)),  # SD 2.x
        dict(
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_eps=1e-3,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        SDXL,
    ],  # fmt: skip
    ids=["sd1", "sd2", "embedding and two levels", "sdxl"],
)
def test_unet(settings, tmp_path):
    import diffusers

    torch.manual_seed(1)
    theirs = randomised(diffusers.UNet2DConditionModel(**(UNET | settings)))
    theirs.save_pretrained(tmp_path)
    ours = load_module(UNet2DConditionModel, tmp_path)
    z, t, cond = torch.randn(3, 4, 16, 8), torch.tensor([1, 500, 999]), torch.randn(3, 9, 20)
    mask = torch.rand(3, 9) > 0.4
    added = dict(text_embeds=torch.randn(3, 10), time_ids=torch.randint(0, 1024, (3, 6))) if settings is SDXL else {}
    mine = {name: x.numpy() for name, x in added.items()}
    # Whether there is a mask does not depend on the settings: both with those that compile soonest.
    for m in (None, mask) if "norm_eps" in settings else (mask,):
        expected = last(theirs(z, t, cond, encoder_attention_mask=m, added_cond_kwargs=added).sample)
        got = compute(ours, last(z), t.numpy(), cond.numpy(), None if m is None else m.numpy(), **mine)
        assert relative_error(got, expected) < 1e-4


def test_gradients_of_the_unet(sd, torch_models):
    """To latents and conditioning, with a mask."""
    torch.manual_seed(1)
    z, t, cond = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999]), torch.randn(3, 9, 20)
    mask, weight = torch.rand(3, 9) > 0.4, torch.randn(3, 4, 8, 8)
    given = [x.clone().requires_grad_() for x in (z, cond)]
    (torch_models["unet"](given[0], t, given[1], encoder_attention_mask=mask).sample * weight).sum().backward()

    def total(z, cond):
        return (compute(sd.unet, z, t.numpy(), cond, mask.numpy()) * last(weight)).sum()

    of_z, of_cond = jax.grad(total, argnums=(0, 1))(last(z), cond.numpy())
    assert relative_error(of_z, last(given[0].grad)) < 1e-4
    assert relative_error(of_cond, given[1].grad) < 1e-4


def test_a_masked_token_is_no_token(sd):
    rng = np.random.default_rng(0)
    z, t, cond = rng.normal(size=(2, 16, 16, 4)), np.array([10, 900]), rng.normal(size=(2, 9, 20))
    mask = np.arange(9)[None].repeat(2, 0) > 0
    assert relative_error(compute(sd.unet, z, t, cond, mask), compute(sd.unet, z, t, cond[:, 1:])) < 1e-5


def test_vae(tmp_path):
    import diffusers

    torch.manual_seed(1)
    theirs = randomised(diffusers.AutoencoderKL(**VAE))
    theirs.save_pretrained(tmp_path)
    vae = load_module(AutoencoderKL, tmp_path)
    x = torch.rand(2, 3, 32, 64) * 2 - 1
    posterior = theirs.encode(x).latent_dist
    mean, logvar = compute(vae, last(x), method="encode")
    assert relative_error(mean, last(posterior.mean)) < 1e-4
    assert relative_error(logvar, last(posterior.logvar)) < 1e-4
    images = theirs.decode(posterior.mean).sample
    assert relative_error(compute(vae, last(posterior.mean), method="decode"), last(images)) < 1e-4


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [2, 90])
def test_text_encoder(act, eos, tmp_path):
    torch.manual_seed(2)
    theirs = text_model(100, eos, hidden_act=act)
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(3, 90, (4, 16))
    ids[0, 5], ids[1, 3:], ids[2, -1], ids[3, 7] = 90, 90, 90, 90
    if eos == 2:  # as published: the end token is the largest id
        ids[ids == 90] = 99
    out, expected = load_module(CLIPTextModel, tmp_path)(jnp.asarray(ids.numpy())), theirs(ids)
    assert relative_error(out.last_hidden_state, expected.last_hidden_state.detach()) < 1e-4
    assert relative_error(out.pooled, expected.pooler_output.detach()) < 1e-4


def test_two_text_encoders(tmp_path):
    """What diffusers' pipeline of Stable Diffusion XL makes of two text encoders of different widths."""
    import transformers

    torch.manual_seed(3)
    one = text_model(100, 90)
    config = {**one.config.to_dict(), "hidden_size": 24, "num_hidden_layers": 2, "projection_dim": 10}
    two = randomised(transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig.from_dict(config)))
    one.save_pretrained(tmp_path / "1")
    two.save_pretrained(tmp_path / "2")
    ids = torch.randint(3, 90, (2, 4, 16))
    ids[:, :, 7], ids[1, 2, 3:] = 90, 90
    expected = [model(i, output_hidden_states=True) for model, i in zip((one, two), ids)]
    ours = CLIPTextModels(
        load_module(CLIPTextModel, tmp_path / "1"), load_module(CLIPTextModelWithProjection, tmp_path / "2")
    )
    out = ours(jnp.asarray(ids.numpy()).swapaxes(0, 1))
    states = torch.cat([e.hidden_states[-2] for e in expected], dim=-1)
    assert relative_error(out.last_hidden_state, states.detach()) < 1e-4
    assert relative_error(out.text_embeds, expected[1].text_embeds.detach()) < 1e-4
    pooled = torch.cat(
        [expected[0].pooler_output, expected[1].last_hidden_state[range(4), (ids[1] == 90).int().argmax(1)]], -1
    )
    assert relative_error(out.pooled, pooled.detach()) < 1e-4


def test_modules_compute_in_their_weights_dtype(published):
    from livo_jax import StableDiffusion

    half = StableDiffusion.from_pretrained(published, jnp.bfloat16)

    def outputs():
        cond = half.text_encoder(jnp.zeros((1, 16), int)).last_hidden_state
        eps = half.unet(jnp.zeros((1, 16, 16, 4)), jnp.zeros(1, int), cond)
        return cond, eps, *half.vae.encode(jnp.zeros((1, 32, 32, 3))), half.vae.decode(jnp.zeros((1, 4, 4, 4)))

    assert {x.dtype for x in jax.eval_shape(outputs)} == {jnp.dtype(jnp.bfloat16)}


def test_latents_that_the_unet_cannot_halve_are_refused(sd):
    with pytest.raises(ValueError, match="multiples of 2"):
        sd.unet(np.zeros((1, 7, 8, 4)), np.zeros(1, int), np.zeros((1, 3, 20)))


@pytest.mark.parametrize(
    "model, config, message",
    [
        (UNet2DConditionModel, dict(class_embed_type="timestep"), "class_embed_type='timestep'"),
        (UNet2DConditionModel, dict(act_fn="gelu", brand_new=7), "act_fn='gelu' .*brand_new=7"),
        (UNet2DConditionModel, dict(down_block_types=["ResnetDownsampleBlock2D"] * 4), "ResnetDownsampleBlock2D"),
        (UNet2DConditionModel, dict(attention_head_dim=[1, 2]), "attention_head_dim has 2 entries for 4 levels"),
        (AutoencoderKL, dict(mid_block_add_attention=False), "mid_block_add_attention=False"),
        (CLIPTextModel, dict(hidden_act="relu"), "relu.*choose from"),
    ],
)
def test_configs_that_we_do_not_compute_are_refused(model, config, message):
    with pytest.raises(ValueError, match=message):
        model.Config.from_json(config)


def test_published_configs_are_read():
    """The files of Stable Diffusion 1.5 and 2.1, with every field that they carry."""
    common = dict(
        _class_name="UNet2DConditionModel", _diffusers_version="0.8.0", act_fn="silu", in_channels=4, out_channels=4,
        block_out_channels=[320, 640, 1280, 1280], center_input_sample=False, downsample_padding=1, freq_shift=0,
        flip_sin_to_cos=True, layers_per_block=2, mid_block_scale_factor=1, norm_eps=1e-5, norm_num_groups=32,
        down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    )  # fmt: skip
    sd15 = common | dict(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
    sd21 = common | dict(
        cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], sample_size=96, use_linear_projection=True,
        dual_cross_attention=False, num_class_embeds=None, only_cross_attention=False, upcast_attention=True,
    )  # fmt: skip
    assert UNet2DConditionModel.Config.from_json(sd15).per_level("attention_head_dim") == (8, 8, 8, 8)
    assert UNet2DConditionModel.Config.from_json(sd21).per_level("attention_head_dim") == (5, 10, 20, 20)
    text = dict(
        _name_or_path="openai/clip-vit-large-patch14", architectures=["CLIPTextModel"], attention_dropout=0.0,
        bos_token_id=0, dropout=0.0, eos_token_id=2, hidden_act="quick_gelu", hidden_size=768, initializer_factor=1.0,
        initializer_range=0.02, intermediate_size=3072, layer_norm_eps=1e-05, max_position_embeddings=77,
        model_type="clip_text_model", num_attention_heads=12, num_hidden_layers=12, pad_token_id=1,
        projection_dim=768, torch_dtype="float32", transformers_version="4.22.0.dev0", vocab_size=49408,
    )  # fmt: skip
    assert CLIPTextModel.Config.from_json(text).hidden_size == 768
    vae = dict(
        _class_name="AutoencoderKL", act_fn="silu", block_out_channels=[128, 256, 512, 512], in_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=4,
        layers_per_block=2, norm_num_groups=32, out_channels=3, sample_size=512,
    )  # fmt: skip
    assert AutoencoderKL.Config.from_json(vae).scaling_factor == 0.18215
