"""The conditional UNet of Stable Diffusion 1.x, 2.x (Rombach et al. 2022) and XL (Podell et al. 2023)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from livo_jax.models.layers import (
    Attention,
    Downsample2D,
    PublishedConfig,
    ResnetBlock2D,
    TimestepEmbedding,
    Upsample2D,
    conv3x3,
    group_norm,
    layer_norm,
    once,
    runner,
    timestep_embedding,
)


@dataclasses.dataclass(frozen=True)
class UNetConfig(PublishedConfig):
    """The fields of a published unet/config.json that change the computation.

    `attention_head_dim` is the number of heads, as the published files (mis)name it; it, `layers_per_block` and
    `transformer_layers_per_block` are one number or one for each level. With `addition_embed_type` "text_time" (XL)
    the time embedding also has a pooled text and sizes, embedded in `addition_time_embed_dim` numbers each;
    together they are `projection_class_embeddings_input_dim` wide.
    """

    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple = (320, 640, 1280, 1280)
    layers_per_block: int | tuple = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    attention_head_dim: int | tuple = 8
    use_linear_projection: bool = False
    transformer_layers_per_block: int | tuple = 1
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    FIXED = {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_type": "default",
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "resnet_out_scale_factor": 1.0,
        "resnet_time_scale_shift": "default",
        "time_embedding_type": "positional",
    }
    # upcast_attention asks for a float32 softmax, which ours always is; dropout is for training it.
    IGNORED = frozenset({"sample_size", "upcast_attention", "addition_embed_type_num_heads", "dropout"})

    def __post_init__(self):
        for names, suffix in ((self.down_block_types, "DownBlock2D"), (self.up_block_types, "UpBlock2D")):
            unknown = [name for name in names if name not in (suffix, "CrossAttn" + suffix)]
            if unknown:
                raise ValueError(f"unknown block types {unknown}: choose from {suffix}, CrossAttn{suffix}")
        if self.addition_embed_type not in (None, "text_time"):
            raise ValueError(f"unknown addition_embed_type={self.addition_embed_type!r}: choose from None, 'text_time'")
        if self.addition_embed_type:
            for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
                if getattr(self, name) is None:
                    raise ValueError(f"addition_embed_type={self.addition_embed_type!r} needs {name}")
        levels = len(self.block_out_channels)
        per_level = "layers_per_block attention_head_dim transformer_layers_per_block"
        for name in ("down_block_types", "up_block_types", *per_level.split()):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(f"{name} has {len(value)} entries for {levels} levels of block_out_channels")
        for name in per_level.split():
            if not all(type(entry) is int and entry > 0 for entry in self.per_level(name)):
                raise ValueError(f"{name}={getattr(self, name)!r}: only one number, or one for each level, above 0")

    def per_level(self, name: str) -> tuple:
        """A field that is one number or one for each level, as one for each level."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)


class GEGLU(nnx.Module):
    def __init__(self, dim: int, *, rngs):
        self.proj = nnx.Linear(dim, 8 * dim, rngs=rngs)

    def __call__(self, x):
        x, gate = jnp.split(self.proj(x), 2, axis=-1)
        return x * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    def __init__(self, dim: int, *, rngs):
        # The published list has a dropout, without weights, at index 1.
        self.net = nnx.List([GEGLU(dim, rngs=rngs), None, nnx.Linear(4 * dim, dim, rngs=rngs)])

    def __call__(self, x):
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nnx.Module):
    def __init__(self, dim: int, heads: int, context_dim: int, *, rngs):
        self.norm1 = layer_norm(dim, rngs=rngs)
        self.attn1 = Attention(dim, heads, rngs=rngs)
        self.norm2 = layer_norm(dim, rngs=rngs)
        self.attn2 = Attention(dim, heads, context_dim, rngs=rngs)
        self.norm3 = layer_norm(dim, rngs=rngs)
        self.ff = FeedForward(dim, rngs=rngs)

    def __call__(self, x, cond, mask):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), cond, mask)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """The transformer blocks of one place in a level of the UNet, around a residual."""

    def __init__(self, level: int, config: UNetConfig, *, rngs):
        channels, heads = config.block_out_channels[level], config.per_level("attention_head_dim")[level]
        layers = config.per_level("transformer_layers_per_block")[level]
        self.norm = group_norm(channels, config.norm_num_groups, 1e-6, rngs=rngs)
        if config.use_linear_projection:
            projection = functools.partial(nnx.Linear, channels, channels, rngs=rngs)
        else:
            projection = functools.partial(nnx.Conv, channels, channels, (1, 1), rngs=rngs)
        self.proj_in = projection()
        self.transformer_blocks = nnx.List(
            [BasicTransformerBlock(channels, heads, config.cross_attention_dim, rngs=rngs) for _ in range(layers)]
        )
        self.proj_out = projection()

    def __call__(self, x, cond, mask):
        B, H, W, C = x.shape
        h = self.proj_in(self.norm(x)).reshape(B, H * W, C)
        run = once if len(self.transformer_blocks) > 1 else BasicTransformerBlock.__call__
        for block in self.transformer_blocks:
            h = run(block, h, cond, mask)
        return x + self.proj_out(h.reshape(B, H, W, C))


def resnet_block(in_channels: int, out_channels: int, config: UNetConfig, *, rngs) -> ResnetBlock2D:
    """A residual block as a UNet of this config has it."""
    time_dim = 4 * config.block_out_channels[0]
    return ResnetBlock2D(in_channels, out_channels, config.norm_num_groups, config.norm_eps, time_dim, rngs=rngs)


class DownBlock2D(nnx.Module):
    """A level of the down path: DownBlock2D, or CrossAttnDownBlock2D where it `attends`."""

    def __init__(self, level: int, attends: bool, config: UNetConfig, *, rngs):
        channels, layers = config.block_out_channels, config.per_level("layers_per_block")[level]
        in_channels, out_channels = channels[max(level - 1, 0)], channels[level]
        self.resnets = nnx.List(
            [resnet_block(out_channels if i else in_channels, out_channels, config, rngs=rngs) for i in range(layers)]
        )
        if attends:
            self.attentions = nnx.List([Transformer2DModel(level, config, rngs=rngs) for _ in range(layers)])
        self.attends = attends
        last = level == len(channels) - 1
        self.downsamplers = nnx.List([] if last else [Downsample2D(out_channels, 1, rngs=rngs)])

    def __call__(self, x, time, cond, mask):
        """Returns the output and the states that the up path takes over."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attends:
                x = self.attentions[i](x, cond, mask)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        return x, skips


class UNetMidBlock2DCrossAttn(nnx.Module):
    def __init__(self, config: UNetConfig, *, rngs):
        channels = config.block_out_channels[-1]
        self.resnets = nnx.List([resnet_block(channels, channels, config, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([Transformer2DModel(len(config.block_out_channels) - 1, config, rngs=rngs)])

    def __call__(self, x, time, cond, mask):
        x = self.attentions[0](self.resnets[0](x, time), cond, mask)
        return self.resnets[1](x, time)


class UpBlock2D(nnx.Module):
    """A level of the up path: UpBlock2D, or CrossAttnUpBlock2D where it `attends`.

    `skip_channels` are the widths of the states taken over from the down path, in order of use.
    """

    def __init__(self, level: int, skip_channels, attends: bool, config: UNetConfig, *, rngs):
        channels = config.block_out_channels
        in_channels, out_channels = channels[min(level + 1, len(channels) - 1)], channels[level]
        self.resnets = nnx.List(
            [
                resnet_block((out_channels if i else in_channels) + skip, out_channels, config, rngs=rngs)
                for i, skip in enumerate(skip_channels)
            ]
        )
        if attends:
            self.attentions = nnx.List([Transformer2DModel(level, config, rngs=rngs) for _ in skip_channels])
        self.attends = attends
        self.upsamplers = nnx.List([Upsample2D(out_channels, rngs=rngs)] if level else [])

    def __call__(self, x, skips, time, cond, mask):
        for i, resnet in enumerate(self.resnets):
            x = resnet(jnp.concatenate([x, skips[i]], axis=-1), time)
            if self.attends:
                x = self.attentions[i](x, cond, mask)
        for upsampler in self.upsamplers:
            x = upsampler(x)
        return x


class UNet2DConditionModel(nnx.Module):
    """Predicts the noise (or the velocity) of noised latents, given text states."""

    Config = UNetConfig

    def __init__(self, config: UNetConfig, *, rngs):
        self.config = config
        self.remat = "none"  # of layers.REMAT; a choice of who takes gradients through the UNet
        self.gather = None  # of who shards it: makes a block's weights whole while it computes (sharding.gather)
        channels = config.block_out_channels
        layers = config.per_level("layers_per_block")

        self.conv_in = conv3x3(config.in_channels, channels[0], rngs=rngs)
        self.time_embedding = TimestepEmbedding(channels[0], 4 * channels[0], rngs=rngs)
        if config.addition_embed_type:
            width = config.projection_class_embeddings_input_dim
            self.add_embedding = TimestepEmbedding(width, 4 * channels[0], rngs=rngs)

        down, skip_channels = [], [channels[0]]
        for level, block_type in enumerate(config.down_block_types):
            down.append(DownBlock2D(level, block_type.startswith("CrossAttn"), config, rngs=rngs))
            skip_channels += [channels[level]] * (layers[level] + len(down[-1].downsamplers))
        self.down_blocks = nnx.List(down)

        self.mid_block = UNetMidBlock2DCrossAttn(config, rngs=rngs)

        up = []
        for level, block_type in zip(reversed(range(len(channels))), config.up_block_types):
            taken = [skip_channels.pop() for _ in range(layers[level] + 1)]
            up.append(UpBlock2D(level, taken, block_type.startswith("CrossAttn"), config, rngs=rngs))
        self.up_blocks = nnx.List(up)

        self.conv_norm_out = group_norm(channels[0], config.norm_num_groups, config.norm_eps, rngs=rngs)
        self.conv_out = conv3x3(channels[0], config.out_channels, rngs=rngs)

    def __call__(self, z_t, t, cond, mask=None, text_embeds=None, time_ids=None):
        """One denoising evaluation.

        Args:
            z_t: [B, h, w, C] noised latents; h and w divisible by 2^(levels-1).
            t: [B] timesteps, 0..T-1.
            cond: [B, L, D] text states.
            mask: [B, L] bool, False where a text state is hidden, or None.
            text_embeds, time_ids: where config.addition_embed_type is "text_time", the pooled text [B, P] and the
                sizes, [B, 6] or [6] of all rows, in pixels: height and width of the original image, top and left of
                its crop, height and width of the wanted image.

        Returns:
            [B, h, w, C] the prediction, in the weights' dtype.
        """
        stride = 2 ** (len(self.config.block_out_channels) - 1)
        if z_t.shape[1] % stride or z_t.shape[2] % stride:
            raise ValueError(f"latents of {z_t.shape[1]}x{z_t.shape[2]}: the UNet needs multiples of {stride}")
        dtype = self.conv_in.bias.dtype  # a kernel may be quantised
        z_t, cond = z_t.astype(dtype), cond.astype(dtype)

        time = timestep_embedding(
            t, self.config.block_out_channels[0], self.config.flip_sin_to_cos, self.config.freq_shift
        )
        time = self.time_embedding(time.astype(dtype))
        if self.config.addition_embed_type:
            sizes = timestep_embedding(
                jnp.broadcast_to(jnp.asarray(time_ids), (len(z_t), 6)).reshape(-1),
                self.config.addition_time_embed_dim, self.config.flip_sin_to_cos, self.config.freq_shift,
            ).reshape(len(z_t), -1)  # fmt: skip
            time += self.add_embedding(jnp.concatenate([text_embeds.astype(dtype), sizes.astype(dtype)], axis=-1))
        run = runner(self.gather, self.remat, lambda block, x, *args: block(x, *args))
        x = self.conv_in(z_t)
        skips = [x]
        for block in self.down_blocks:
            x, new = run(block, x, time, cond, mask)
            skips += new
        x = run(self.mid_block, x, time, cond, mask)
        for block in self.up_blocks:
            taken = [skips.pop() for _ in block.resnets]
            x = run(block, x, taken, time, cond, mask)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))
