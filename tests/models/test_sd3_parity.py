"""The networks of Stable Diffusion 3 compute what diffusers and transformers do with the same published weights."""

import gc
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from livo_jax.files.modules import initialise, load_module, skeleton
from livo_jax.models.mmdit import SD3Transformer2DModel
from livo_jax.models.t5 import T5EncoderModel, distance_buckets
from livo_jax.models.vae import AutoencoderKL
from livo_jax.models.weights import TO_PUBLISHED, count, published_name, split
from tests.conftest import VAE, randomised, relative_error
from tests.models.test_parity import compute, last

TINY = dict(
    sample_size=6, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=3,
    joint_attention_dim=20, caption_projection_dim=12, pooled_projection_dim=10, pos_embed_max_size=5,
)  # fmt: skip
SD35 = dict(dual_attention_layers=(0,), qk_norm="rms_norm")
T5 = dict(vocab_size=50, d_model=20, d_kv=6, d_ff=28, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu")


@pytest.mark.parametrize("settings", [{}, SD35], ids=["3", "3.5"])
def test_transformer(settings, tmp_path):
    """The prediction, and its gradients to latents, text states and pooled text; of latents that are no square."""
    import diffusers

    torch.manual_seed(1)
    theirs = randomised(diffusers.SD3Transformer2DModel(**TINY | settings))
    theirs.save_pretrained(tmp_path)
    ours = load_module(SD3Transformer2DModel, tmp_path)
    given = z, cond, pooled = torch.randn(3, 4, 6, 8), torch.randn(3, 9, 20), torch.randn(3, 10)
    t, weight = torch.tensor([1.0, 437.5, 1000.0]), torch.randn(3, 4, 6, 8)
    for x in given:
        x.requires_grad_()
    expected = theirs(z, cond, pooled, t).sample
    (expected * weight).sum().backward()

    def total(z, cond, pooled):
        out = compute(ours, z, t.numpy(), cond, None, pooled)
        return (out * last(weight)).sum(), out

    mine = last(z), cond.detach().numpy(), pooled.detach().numpy()
    (_, got), gradients = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(*mine)
    assert relative_error(got, last(expected)) < 1e-4
    for gradient, x in zip(gradients, (last(z.grad), cond.grad, pooled.grad)):
        assert relative_error(gradient, x) < 1e-4
    if settings:  # a masked text state is none
        mask = np.arange(9)[None].repeat(3, 0) > 1
        got = compute(ours, mine[0], t.numpy(), mine[1], mask, mine[2])
        assert relative_error(got, last(theirs(z, cond[:, 2:], pooled, t).sample)) < 1e-4


def test_t5(tmp_path):
    """Of texts that are longer than the distances that have a bucket of their own."""
    import transformers
    from transformers.models.t5.modeling_t5 import T5Attention

    torch.manual_seed(2)
    theirs = randomised(transformers.T5EncoderModel(transformers.T5Config(**T5)))
    with torch.no_grad():  # at its initial size the bias would not show
        theirs.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.normal_()
    theirs.save_pretrained(tmp_path)
    ours, ids = load_module(T5EncoderModel, tmp_path), torch.randint(0, 50, (2, 40))
    expected = theirs(ids).last_hidden_state
    assert relative_error(compute(ours, jnp.asarray(ids.numpy())), expected.detach()) < 1e-4
    distance = torch.arange(300)[None] - torch.arange(300)[:, None]
    buckets = T5Attention._relative_position_bucket(distance, True, 32, 128)
    np.testing.assert_array_equal(distance_buckets(300, ours.config), buckets)


def test_vae(tmp_path):
    """Of 16 channels, without quant convolutions; latents are shifted and scaled as diffusers' pipeline does."""
    import diffusers

    torch.manual_seed(3)
    settings = dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
    scales = dict(scaling_factor=1.5305, shift_factor=0.0609)
    theirs = randomised(diffusers.AutoencoderKL(**VAE, **settings, **scales))
    theirs.save_pretrained(tmp_path)
    vae, x = load_module(AutoencoderKL, tmp_path), torch.rand(2, 3, 16, 8) * 2 - 1
    posterior = theirs.encode(x).latent_dist
    mean, logvar = compute(vae, last(x), method="encode")
    assert relative_error(mean, last(posterior.mean)) < 1e-4
    assert relative_error(logvar, last(posterior.logvar)) < 1e-4
    z = vae.config.scale(mean)
    assert relative_error(z, last((posterior.mean - 0.0609) * 1.5305)) < 1e-4
    assert relative_error(vae.config.unscale(z), mean) < 1e-5
    assert relative_error(compute(vae, mean, method="decode"), last(theirs.decode(posterior.mean).sample)) < 1e-4


@pytest.mark.parametrize(
    "model, config, message",
    [
        (SD3Transformer2DModel, dict(qk_norm="layer_norm"), "qk_norm='layer_norm': choose from None, 'rms_norm'"),
        (SD3Transformer2DModel, dict(caption_projection_dim=7), "caption_projection_dim=7: .* = 1152"),
        (T5EncoderModel, dict(feed_forward_proj="relu"), "feed_forward_proj='relu' .only 'gated-gelu'"),
    ],
)
def test_configs_that_we_do_not_compute_are_refused(model, config, message):
    with pytest.raises(ValueError, match=message):
        model.Config.from_json(config)


def shapes_of(abstract) -> dict[str, tuple]:
    """The published names and shapes of a tree."""
    shapes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        order = TO_PUBLISHED.get(leaf.ndim) if path[-1].key == "kernel" else None
        shapes[published_name(path)] = tuple(leaf.shape[i] for i in order) if order else leaf.shape
    return shapes


MEDIUM = dict(  # 3.5-medium, as published
    sample_size=128, patch_size=2, in_channels=16, num_layers=24, attention_head_dim=64, num_attention_heads=24,
    joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048, out_channels=16,
    pos_embed_max_size=384, dual_attention_layers=list(range(13)), qk_norm="rms_norm",
)  # fmt: skip
LARGE = MEDIUM | dict(
    num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192, dual_attention_layers=[]
)
SD3_MEDIUM = MEDIUM | dict(pos_embed_max_size=192, dual_attention_layers=[], qk_norm=None)


@pytest.mark.parametrize("fields", [SD3_MEDIUM, MEDIUM, LARGE], ids=["3-medium", "3.5-medium", "3.5-large"])
def test_published_names_and_shapes(fields, tmp_path):
    """By abstract evaluation, against diffusers' class on the meta device."""
    import diffusers

    (tmp_path / "config.json").write_text(json.dumps(fields | {"_class_name": "SD3Transformer2DModel"}))
    with torch.device("meta"):
        theirs = diffusers.SD3Transformer2DModel(**fields)
    _, abstract = skeleton(SD3Transformer2DModel, tmp_path)
    expected = {name: tuple(x.shape) for name, x in theirs.state_dict().items()}
    assert shapes_of(abstract) == expected
    assert count(abstract) == sum(map(math.prod, expected.values()))


def test_positions_of_random_weights_are_diffusers(tmp_path):
    import diffusers

    theirs = diffusers.SD3Transformer2DModel(**TINY)
    theirs.save_pretrained(tmp_path)
    _, params = split(initialise(SD3Transformer2DModel, tmp_path))
    np.testing.assert_allclose(params["pos_embed"]["pos_embed"], theirs.pos_embed.pos_embed, atol=1e-6)


def test_they_compute_in_their_weights_dtype(tmp_path):
    import diffusers

    diffusers.SD3Transformer2DModel(**TINY, **SD35).save_pretrained(tmp_path)
    ours = load_module(SD3Transformer2DModel, tmp_path, jnp.bfloat16)
    given = jnp.zeros((1, 6, 6, 4)), jnp.zeros(1), jnp.zeros((1, 9, 20)), None, jnp.zeros((1, 10))
    assert jax.eval_shape(lambda: ours(*given)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="latents of 7x6: the transformer needs multiples of 2"):
        ours(jnp.zeros((1, 7, 6, 4)), *given[1:])
    with pytest.raises(ValueError, match="latents of 6 x 3 patches: the transformer has positions for 5"):
        ours(jnp.zeros((1, 12, 6, 4)), *given[1:])


@pytest.mark.slow  # 10 GB on the disk, 13 GiB of memory, minutes
def test_the_full_size_of_medium(tmp_path):
    """3.5 medium's transformer in float32, at 256 px, with random weights, sharded as published."""
    import diffusers

    torch.manual_seed(0)
    theirs = randomised(diffusers.SD3Transformer2DModel(**MEDIUM)).requires_grad_(False)
    theirs.save_pretrained(tmp_path, max_shard_size="4GB")
    z, cond, pooled = torch.randn(1, 16, 32, 32), torch.randn(1, 333, 4096), torch.randn(1, 2048)
    expected = last(theirs(z, cond, pooled, torch.tensor([500.0])).sample)
    del theirs
    gc.collect()
    ours = load_module(SD3Transformer2DModel, tmp_path)
    assert count(split(ours)[1]) > 2.4e9
    assert (
        relative_error(compute(ours, last(z), np.array([500.0]), cond.numpy(), None, pooled.numpy()), expected) < 1e-3
    )
