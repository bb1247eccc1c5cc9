"""The encoder of T5 1.1 (Raffel et al. 2020), the third text encoder of Stable Diffusion 3."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from livo_jax.models.attention import attention
from livo_jax.models.clip import IGNORED
from livo_jax.models.layers import PublishedConfig, runner


@dataclasses.dataclass(frozen=True)
class T5Config(PublishedConfig):
    """The fields of a published text_encoder_3/config.json that change the computation."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    FIXED = {"model_type": "t5", "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True}
    IGNORED = IGNORED | frozenset(
        "dropout_rate num_decoder_layers is_encoder_decoder use_cache eos_token_id decoder_start_token_id"
        " classifier_dropout output_past n_positions task_specific_params scale_decoder_outputs".split()
    )


def distance_buckets(length: int, config: T5Config) -> np.ndarray:
    """[length, length] int: the bucket of each query's distance to each key.

    Half of the buckets are for keys that come later. Of each half one half is of one distance each, the other of
    distances in proportion, the last of all from relative_attention_max_distance on.
    """
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    half = config.relative_attention_num_buckets // 2
    exact, far = half // 2, np.maximum(np.abs(distance), 1)
    # Rounded as PyTorch's float32 does.
    grown = np.log(far.astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(config.relative_attention_max_distance / exact)
    )
    large = np.minimum(exact + (grown * np.float32(half - exact)).astype(int), half - 1)
    return np.where(np.abs(distance) < exact, np.abs(distance), large) + half * (distance > 0)


def rms_norm(config: T5Config, *, rngs):
    return nnx.RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, rngs=rngs)


class T5Attention(nnx.Module):
    def __init__(self, config: T5Config, has_bias: bool, *, rngs):
        self.config, inner = config, config.num_heads * config.d_kv
        self.q, self.k, self.v = (nnx.Linear(config.d_model, inner, use_bias=False, rngs=rngs) for _ in range(3))
        self.o = nnx.Linear(inner, config.d_model, use_bias=False, rngs=rngs)
        if has_bias:  # the first layer's serves all
            buckets = config.relative_attention_num_buckets
            self.relative_attention_bias = nnx.Embed(buckets, config.num_heads, rngs=rngs)

    def bias(self, length: int):
        """[1, N, length, length], added to the products of queries and keys."""
        return self.relative_attention_bias.embedding[distance_buckets(length, self.config)].transpose(2, 0, 1)[None]

    def __call__(self, x, bias):
        return self.o(attention(self.q(x), self.k(x), self.v(x), self.config.num_heads, bias=bias, scale=1.0))


class T5LayerSelfAttention(nnx.Module):
    def __init__(self, config: T5Config, has_bias: bool, *, rngs):
        self.SelfAttention = T5Attention(config, has_bias, rngs=rngs)
        self.layer_norm = rms_norm(config, rngs=rngs)

    def __call__(self, x, bias):
        return x + self.SelfAttention(self.layer_norm(x), bias)


class T5GatedFeedForward(nnx.Module):
    def __init__(self, config: T5Config, *, rngs):
        self.wi_0, self.wi_1 = (nnx.Linear(config.d_model, config.d_ff, use_bias=False, rngs=rngs) for _ in range(2))
        self.wo = nnx.Linear(config.d_ff, config.d_model, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.wo(jax.nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))


class T5LayerFF(nnx.Module):
    def __init__(self, config: T5Config, *, rngs):
        self.DenseReluDense = T5GatedFeedForward(config, rngs=rngs)
        self.layer_norm = rms_norm(config, rngs=rngs)

    def __call__(self, x):
        return x + self.DenseReluDense(self.layer_norm(x))


class T5Block(nnx.Module):
    def __init__(self, config: T5Config, has_bias: bool, *, rngs):
        self.layer = nnx.List([T5LayerSelfAttention(config, has_bias, rngs=rngs), T5LayerFF(config, rngs=rngs)])

    def __call__(self, x, bias):
        return self.layer[1](self.layer[0](x, bias))


class T5Stack(nnx.Module):
    def __init__(self, config: T5Config, *, rngs):
        self.block = nnx.List([T5Block(config, i == 0, rngs=rngs) for i in range(config.num_layers)])
        self.final_layer_norm = rms_norm(config, rngs=rngs)
        self.gather = None  # of who shards it, as of the UNet

    def __call__(self, x):
        bias = self.block[0].layer[0].SelfAttention.bias(x.shape[1])
        run = runner(self.gather)
        for block in self.block:
            x = run(block, x, bias)
        return self.final_layer_norm(x)


class T5EncoderModel(nnx.Module):
    """Reads texts of any length; a token sees all others, the padding too, as Stable Diffusion 3 was trained."""

    Config = T5Config

    def __init__(self, config: T5Config, *, rngs):
        self.config = config
        self.shared = nnx.Embed(config.vocab_size, config.d_model, rngs=rngs)
        self.encoder = T5Stack(config, rngs=rngs)

    def __call__(self, ids):
        """States [B, L, D] of token ids [B, L] int32."""
        return self.encoder(jnp.asarray(self.shared.embedding[ids]))
