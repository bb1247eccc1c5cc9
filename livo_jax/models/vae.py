"""The image autoencoder of Stable Diffusion (AutoencoderKL, Rombach et al. 2022), of 4 channels or, in 3, 16."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from livo_jax.models.layers import (
    Attention,
    Downsample2D,
    PublishedConfig,
    ResnetBlock2D,
    Upsample2D,
    conv3x3,
    group_norm,
)

EPS = 1e-6  # of every group norm in the published autoencoders


@dataclasses.dataclass(frozen=True)
class VAEConfig(PublishedConfig):
    """The fields of a published vae/config.json that change the computation.

    force_upcast: whether float16 overflows in it, so that float32 is to take its place. use_quant_conv and
    use_post_quant_conv, and a shift_factor of nearly the latents' mean: Stable Diffusion 3 has none of the first two,
    and is alone with the third.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple = (64,)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    down_block_types: tuple = ("DownEncoderBlock2D",)
    up_block_types: tuple = ("UpDecoderBlock2D",)
    force_upcast: bool = True
    shift_factor: int | float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    FIXED = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "mid_block_add_attention": True,
    }
    IGNORED = frozenset({"sample_size"})

    def __post_init__(self):
        # The block types have one kind each; their number is that of block_out_channels.
        for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            if set(getattr(self, name)) != {kind}:
                raise ValueError(f"{name}={getattr(self, name)!r}: only {kind}")
        if not 0 < self.scaling_factor < math.inf or not math.isfinite(self.shift_factor or 0):
            found = f"scaling_factor={self.scaling_factor}, shift_factor={self.shift_factor}"
            raise ValueError(f"{found}: finite numbers are wanted, the first above 0")

    def scale(self, z):
        """Latents as the network that denoises has them, of those that the VAE has."""
        return self.scaling_factor * (z - self.shift_factor if self.shift_factor else z)

    def unscale(self, z):
        """Latents as the VAE has them: undoes `scale`."""
        z = z / self.scaling_factor
        return z + self.shift_factor if self.shift_factor else z


class VAEAttention(Attention):
    """Single-head self-attention over the pixels of [B, h, w, C], with its norm and residual."""

    def __init__(self, channels: int, groups: int, *, rngs):
        super().__init__(channels, heads=1, qkv_bias=True, rngs=rngs)
        self.group_norm = group_norm(channels, groups, EPS, rngs=rngs)

    def __call__(self, x):
        B, H, W, C = x.shape
        h = super().__call__(self.group_norm(x).reshape(B, H * W, C))
        return x + h.reshape(x.shape)


class VAEMidBlock2D(nnx.Module):
    def __init__(self, channels: int, groups: int, *, rngs):
        self.resnets = nnx.List([ResnetBlock2D(channels, channels, groups, EPS, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([VAEAttention(channels, groups, rngs=rngs)])

    def __call__(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class VAEBlock2D(nnx.Module):
    """One level: resnets, then a down- or upsampler, or none at the last level."""

    def __init__(self, in_channels, out_channels, layers, groups, resample, *, rngs):
        self.resnets = nnx.List(
            [
                ResnetBlock2D(out_channels if i else in_channels, out_channels, groups, EPS, rngs=rngs)
                for i in range(layers)
            ]
        )
        if resample == "down":
            self.downsamplers = nnx.List([Downsample2D(out_channels, ((0, 1), (0, 1)), rngs=rngs)])
        elif resample == "up":
            self.upsamplers = nnx.List([Upsample2D(out_channels, rngs=rngs)])
        self.resample = resample

    def __call__(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        if self.resample == "down":
            return self.downsamplers[0](x)
        return self.upsamplers[0](x) if self.resample == "up" else x


class Encoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, rngs):
        channels, groups = config.block_out_channels, config.norm_num_groups
        last = len(channels) - 1
        self.conv_in = conv3x3(config.in_channels, channels[0], rngs=rngs)
        self.down_blocks = nnx.List(
            [
                VAEBlock2D(
                    channels[max(i - 1, 0)], c, config.layers_per_block, groups, "down" if i < last else None, rngs=rngs
                )
                for i, c in enumerate(channels)
            ]
        )
        self.mid_block = VAEMidBlock2D(channels[-1], groups, rngs=rngs)
        self.conv_norm_out = group_norm(channels[-1], groups, EPS, rngs=rngs)
        self.conv_out = conv3x3(channels[-1], 2 * config.latent_channels, rngs=rngs)

    def __call__(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, rngs):
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        last = len(channels) - 1
        self.conv_in = conv3x3(config.latent_channels, channels[0], rngs=rngs)
        self.mid_block = VAEMidBlock2D(channels[0], groups, rngs=rngs)
        self.up_blocks = nnx.List(
            [
                VAEBlock2D(
                    channels[max(i - 1, 0)],
                    c,
                    config.layers_per_block + 1,
                    groups,
                    "up" if i < last else None,
                    rngs=rngs,
                )
                for i, c in enumerate(channels)
            ]
        )
        self.conv_norm_out = group_norm(channels[-1], groups, EPS, rngs=rngs)
        self.conv_out = conv3x3(channels[-1], config.out_channels, rngs=rngs)

    def __call__(self, z):
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Images [B, H, W, 3] in [-1, 1] <-> latents [B, h, w, C], h = H / 2^(levels-1)."""

    Config = VAEConfig

    def __init__(self, config: VAEConfig, *, rngs):
        self.config = config
        C = config.latent_channels
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        if config.use_quant_conv:
            self.quant_conv = nnx.Conv(2 * C, 2 * C, (1, 1), rngs=rngs)
        if config.use_post_quant_conv:
            self.post_quant_conv = nnx.Conv(C, C, (1, 1), rngs=rngs)

    def encode(self, images):
        """The posterior of images [B, H, W, 3]: its mean and log-variance, each [B, h, w, C], unscaled."""
        moments = self.encoder(images.astype(self.encoder.conv_in.bias.dtype))
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, z):
        """Images [B, H, W, 3], about [-1, 1], of latents that config.unscale made."""
        z = z.astype(self.decoder.conv_in.bias.dtype)
        return self.decoder(self.post_quant_conv(z) if self.config.use_post_quant_conv else z)
