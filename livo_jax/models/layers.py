"""Building blocks that the UNet, the VAE and the text encoder share.

Attribute names spell the published state-dict names: `resnets.0.conv1` here is `resnets.0.conv1`
in a Stable Diffusion file. Activations are channels-last, [B, H, W, C]. A module computes in the
dtype of its weights; normalisation statistics and the softmax are float32 in every case.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from livo_jax.models.attention import attention
from livo_jax.models.weights import apply, split

ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
}


class PublishedConfig:
    """Mixin of the model configs: a frozen dataclass whose fields bear the published JSON names.

    `FIXED` names the published fields of which we compute one value only, `IGNORED` those that do
    not change the computation.
    """

    FIXED: dict = {}
    IGNORED: frozenset = frozenset()

    @classmethod
    def from_json(cls, published: dict):
        """Reads a published config.json.

        Args:
            published: the JSON object. Fields that are absent take the published defaults.

        Raises:
            ValueError: a field asks for a computation that we do not have; all such fields are
                listed. A field that we do not know passes only if it is null, false or empty, or a list of such.
        """
        fields = {f.name: f.type for f in dataclasses.fields(cls)}
        supported, unsupported = {}, []
        for name, value in published.items():
            if name in fields:
                supported[name] = tuple(value) if isinstance(value, list) else value
                kind = int | float if fields[name] is float else fields[name]
                if not isinstance(supported[name], kind):
                    unsupported.append(f"{name}={value!r} (only {getattr(kind, '__name__', kind)})")
            elif name in cls.FIXED:
                if value != cls.FIXED[name] and (value, cls.FIXED[name]) != ("swish", "silu"):  # one by two names
                    unsupported.append(f"{name}={value!r} (only {cls.FIXED[name]!r})")
            elif not name.startswith("_") and name not in cls.IGNORED:
                if any(value) if isinstance(value, list) else value:
                    unsupported.append(f"{name}={value!r}")
        if unsupported:
            raise ValueError(f"{cls.__name__} does not support: {', '.join(unsupported)}; take a model without")
        return cls(**supported)


class Attention(nnx.Module):
    """Attention of tokens [B, L, D] to themselves or to a context [B, S, D_context]."""

    def __init__(self, dim: int, heads: int, context_dim=None, qkv_bias=False, *, rngs):
        self.heads = heads
        linear = functools.partial(nnx.Linear, use_bias=qkv_bias, rngs=rngs)
        self.to_q = linear(dim, dim)
        self.to_k = linear(context_dim or dim, dim)
        self.to_v = linear(context_dim or dim, dim)
        self.to_out = nnx.List([nnx.Linear(dim, dim, rngs=rngs)])

    def __call__(self, x, context=None, mask=None):
        context = x if context is None else context
        out = attention(self.to_q(x), self.to_k(context), self.to_v(context), self.heads, mask)
        return self.to_out[0](out)


def once(block: nnx.Module, *args):
    """block(*args), traced and lowered once for all blocks of its structure and shapes."""
    return apply(*split(block), *args)


def gathered(gather):
    """Runs a block on gather(its input, its weights), made when the input is there: no two blocks' at once."""

    def run(block, x, *args):
        graph, params = split(block)
        x, params = gather(*jax.lax.optimization_barrier((x, params)))
        return nnx.merge(graph, params)(x, *args)

    return run


def all_but_gathered(primitive, *_, **__):
    """The checkpoint policy that keeps everything but gathered weights: the backward pass gathers them again."""
    return primitive.name not in ("sharding_constraint", "optimization_barrier")


def is_convolution(primitive, *_, **__) -> bool:
    return primitive is jax.lax.conv_general_dilated_p


# What a block keeps of its forward pass for the backward pass, which computes the rest again.
REMAT = {
    "none": None,  # everything
    # The results of products with weights: those of attention, which have a batch, would be all probabilities.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, is_convolution
    ),
    "full": jax.checkpoint_policies.nothing_saveable,  # its input alone
}


def runner(gather, remat: str = "none", plain=once):
    """How a stack runs its blocks: run(block, x, *args).

    Args:
        gather: as `gathered` takes it, or None. remat: of REMAT; none keeps gathered weights. plain: how, without both.
    """
    run = gathered(gather) if gather else plain
    if remat != "none":
        return nnx.remat(run, policy=REMAT[remat])
    return nnx.remat(run, policy=all_but_gathered) if gather else run


def conv3x3(in_channels: int, out_channels: int, strides=1, padding=1, *, rngs):
    return nnx.Conv(in_channels, out_channels, (3, 3), strides, padding=padding, rngs=rngs)


def group_norm(channels: int, groups: int, eps: float, *, rngs):
    # The two-pass variance: E[x^2] - E[x]^2 loses digits where the mean is large.
    return nnx.GroupNorm(channels, groups, epsilon=eps, use_fast_variance=False, rngs=rngs)


def layer_norm(channels: int, eps: float = 1e-5, *, rngs):
    return nnx.LayerNorm(channels, epsilon=eps, use_fast_variance=False, rngs=rngs)


class TimestepEmbedding(nnx.Module):
    def __init__(self, in_dim: int, out_dim: int, *, rngs):
        self.linear_1 = nnx.Linear(in_dim, out_dim, rngs=rngs)
        self.linear_2 = nnx.Linear(out_dim, out_dim, rngs=rngs)

    def __call__(self, x):
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class ResnetBlock2D(nnx.Module):
    """Two convolutions around a residual; takes the time embedding where `time_dim` is given."""

    def __init__(self, in_channels, out_channels, groups, eps, time_dim=None, *, rngs):
        self.norm1 = group_norm(in_channels, groups, eps, rngs=rngs)
        self.conv1 = conv3x3(in_channels, out_channels, rngs=rngs)
        if time_dim is not None:
            self.time_emb_proj = nnx.Linear(time_dim, out_channels, rngs=rngs)
        self.norm2 = group_norm(out_channels, groups, eps, rngs=rngs)
        self.conv2 = conv3x3(out_channels, out_channels, rngs=rngs)
        if in_channels != out_channels:
            self.conv_shortcut = nnx.Conv(in_channels, out_channels, (1, 1), rngs=rngs)
        self.projects = in_channels != out_channels

    def __call__(self, x, time=None):
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        if time is not None:
            h += self.time_emb_proj(jax.nn.silu(time))[:, None, None, :]
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return (self.conv_shortcut(x) if self.projects else x) + h


class Downsample2D(nnx.Module):
    """Halves H and W. The UNet pads both sides (1), the VAE the ends only (((0, 1), (0, 1)))."""

    def __init__(self, channels: int, padding, *, rngs):
        self.conv = conv3x3(channels, channels, 2, padding, rngs=rngs)

    def __call__(self, x):
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Doubles H and W by nearest neighbours, then convolves."""

    def __init__(self, channels: int, *, rngs):
        self.conv = conv3x3(channels, channels, rngs=rngs)

    def __call__(self, x):
        return self.conv(x.repeat(2, axis=1).repeat(2, axis=2))


def timestep_embedding(t, dim: int, flip_sin_to_cos: bool, freq_shift: float):
    """Sinusoidal embedding of timesteps (Ho et al. 2020, as Stable Diffusion arranges it).

    Args:
        t: [B] timesteps, integer or float.
        dim: even width of the embedding.

    Returns:
        [B, dim] float32.
    """
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000) * jnp.arange(half) / (half - freq_shift))
    angles = t.astype(jnp.float32)[:, None] * frequencies
    sin_cos = [jnp.cos(angles), jnp.sin(angles)] if flip_sin_to_cos else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(sin_cos, axis=-1)
