"""The multimodal diffusion transformer of Stable Diffusion 3 and 3.5 (Esser et al. 2024, figure 2)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from livo_jax.models.attention import attention
from livo_jax.models.layers import PublishedConfig, TimestepEmbedding, runner, timestep_embedding

EPS = 1e-6  # of every norm in it
TIME_DIM = 256  # of the sinusoidal embedding of a timestep


@dataclasses.dataclass(frozen=True)
class MMDiTConfig(PublishedConfig):
    """The fields of a published transformer/config.json that change the computation.

    `dual_attention_layers` names the blocks in which the image attends to itself once more, and `qk_norm` "rms_norm"
    normalises queries and keys head by head: both are of 3.5. `pos_embed_max_size` is in patches.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple = ()
    qk_norm: str | None = None

    FIXED = {"_class_name": "SD3Transformer2DModel"}

    def __post_init__(self):
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm={self.qk_norm!r}: choose from None, 'rms_norm'")
        if self.caption_projection_dim != self.width:
            raise ValueError(
                f"caption_projection_dim={self.caption_projection_dim}: text and image are one sequence, so it is"
                f" num_attention_heads * attention_head_dim = {self.width}"
            )
        if self.width % 4:
            raise ValueError(f"num_attention_heads * attention_head_dim = {self.width}: positions want a multiple of 4")

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


def plain_norm(width: int, *, rngs):
    """A layer norm without weights: what modulates it follows."""
    return nnx.LayerNorm(width, epsilon=EPS, use_bias=False, use_scale=False, use_fast_variance=False, rngs=rngs)


def position_embedding(width: int, grid: int, base: int) -> np.ndarray:
    """Sines and cosines [1, grid^2, width] float32 of a square of patches, its edge `base` patches of training long.

    The first half is of the column, the second of the row.
    """
    places = np.arange(grid, dtype=np.float32) / np.float32(grid / base)
    frequencies = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
    angles = np.outer(places, frequencies)
    of_place = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # [grid, width / 2]
    shape = (grid, grid, width // 2)
    both = np.broadcast_to(of_place[None], shape), np.broadcast_to(of_place[:, None], shape)
    return np.concatenate(both, axis=-1).reshape(1, grid * grid, width).astype(np.float32)


class PatchEmbed(nnx.Module):
    """Latents [B, h, w, C] as tokens [B, (h / p) (w / p), D], with their positions; `pos_embed` is a constant."""

    def __init__(self, config: MMDiTConfig, *, rngs):
        patch, self.grid = config.patch_size, config.pos_embed_max_size
        self.proj = nnx.Conv(config.in_channels, config.width, (patch, patch), patch, padding="VALID", rngs=rngs)
        self.pos_embed = nnx.Param(jnp.zeros((1, self.grid**2, config.width)))

    def __call__(self, z):
        x = self.proj(z)
        _, h, w, D = x.shape
        if max(h, w) > self.grid:
            raise ValueError(f"latents of {h} x {w} patches: the transformer has positions for {self.grid}")
        top, left = (self.grid - h) // 2, (self.grid - w) // 2
        places = self.pos_embed[...].reshape(self.grid, self.grid, D)[top : top + h, left : left + w]
        return (x + places).reshape(len(x), h * w, D).astype(x.dtype)


class TimeTextEmbedding(nnx.Module):
    """The vector that modulates every block, of the timestep and the pooled text."""

    def __init__(self, config: MMDiTConfig, *, rngs):
        self.timestep_embedder = TimestepEmbedding(TIME_DIM, config.width, rngs=rngs)
        self.text_embedder = TimestepEmbedding(config.pooled_projection_dim, config.width, rngs=rngs)

    def __call__(self, t, pooled):
        time = timestep_embedding(t, TIME_DIM, flip_sin_to_cos=True, freq_shift=0)
        return self.timestep_embedder(time.astype(pooled.dtype)) + self.text_embedder(pooled)


class Modulation(nnx.Module):
    """`parts` vectors [B, 1, D] of the vector [B, D] that modulates."""

    def __init__(self, width: int, parts: int, *, rngs):
        self.parts = parts
        self.linear = nnx.Linear(width, parts * width, rngs=rngs)

    def __call__(self, vector):
        return jnp.split(self.linear(jax.nn.silu(vector))[:, None], self.parts, axis=-1)


class JointAttention(nnx.Module):
    """Attention of the image's tokens, and where `joint` of the text's too, to both.

    The text has projections of its own; without `writes_text` its tokens are read and not changed.
    """

    def __init__(self, config: MMDiTConfig, joint: bool, writes_text: bool, *, rngs):
        width, self.heads, self.writes_text = config.width, config.num_attention_heads, writes_text

        def linear():
            return nnx.Linear(width, width, rngs=rngs)

        def norm():  # of each head
            return nnx.RMSNorm(config.attention_head_dim, epsilon=EPS, rngs=rngs) if config.qk_norm else None

        self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
        self.norm_q, self.norm_k = norm(), norm()
        self.to_out = nnx.List([linear()])
        if joint:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = linear(), linear(), linear()
            self.norm_added_q, self.norm_added_k = norm(), norm()
        if writes_text:
            self.to_add_out = linear()

    def _normed(self, x, norm):
        return x if norm is None else norm(x.reshape(*x.shape[:2], self.heads, -1)).reshape(x.shape)

    def __call__(self, x, text=None, mask=None):
        """mask: [B, L + S] bool, of the image's tokens and then the text's."""
        q, k, v = self._normed(self.to_q(x), self.norm_q), self._normed(self.to_k(x), self.norm_k), self.to_v(x)
        if text is None:
            return self.to_out[0](attention(q, k, v, self.heads))
        added_q = self._normed(self.add_q_proj(text), self.norm_added_q)
        added_k = self._normed(self.add_k_proj(text), self.norm_added_k)
        pairs = (q, added_q), (k, added_k), (v, self.add_v_proj(text))
        out = attention(*(jnp.concatenate(pair, axis=1) for pair in pairs), self.heads, mask)
        of_image, of_text = jnp.split(out, [x.shape[1]], axis=1)
        return self.to_out[0](of_image), self.to_add_out(of_text) if self.writes_text else None


class GELU(nnx.Module):
    def __init__(self, dim: int, *, rngs):
        self.proj = nnx.Linear(dim, 4 * dim, rngs=rngs)

    def __call__(self, x):
        return jax.nn.gelu(self.proj(x), approximate=True)


class FeedForward(nnx.Module):
    def __init__(self, dim: int, *, rngs):
        # The published list has a dropout, without weights, at index 1.
        self.net = nnx.List([GELU(dim, rngs=rngs), None, nnx.Linear(4 * dim, dim, rngs=rngs)])

    def __call__(self, x):
        return self.net[2](self.net[0](x))


class JointTransformerBlock(nnx.Module):
    """A block of both sequences; the last one leaves the text as it is."""

    def __init__(self, index: int, config: MMDiTConfig, *, rngs):
        width = config.width
        self.is_dual, self.is_last = index in config.dual_attention_layers, index == config.num_layers - 1
        self.norm1 = Modulation(width, 9 if self.is_dual else 6, rngs=rngs)
        self.norm1_context = Modulation(width, 2 if self.is_last else 6, rngs=rngs)
        self.attn = JointAttention(config, joint=True, writes_text=not self.is_last, rngs=rngs)
        if self.is_dual:
            self.attn2 = JointAttention(config, joint=False, writes_text=False, rngs=rngs)
        self.ff = FeedForward(width, rngs=rngs)
        if not self.is_last:
            self.ff_context = FeedForward(width, rngs=rngs)
        self.norm = plain_norm(width, rngs=rngs)  # the same wherever one is

    def __call__(self, x, text, vector, mask):
        """Returns the image's tokens [B, L, D] and the text's [B, S, D]."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate, *dual = self.norm1(vector)
        normed = self.norm(x)
        if self.is_last:
            text_scale, text_shift = self.norm1_context(vector)
        else:
            text_shift, text_scale, text_gate, *text_ff = self.norm1_context(vector)
        normed_text = self.norm(text) * (1 + text_scale) + text_shift
        of_image, of_text = self.attn(normed * (1 + scale) + shift, normed_text, mask)
        x = x + gate * of_image
        if self.is_dual:
            dual_shift, dual_scale, dual_gate = dual
            x = x + dual_gate * self.attn2(normed * (1 + dual_scale) + dual_shift)
        x = x + ff_gate * self.ff(self.norm(x) * (1 + ff_scale) + ff_shift)
        if self.is_last:
            return x, text
        ff_shift, ff_scale, ff_gate = text_ff
        text = text + text_gate * of_text
        return x, text + ff_gate * self.ff_context(self.norm(text) * (1 + ff_scale) + ff_shift)


class SD3Transformer2DModel(nnx.Module):
    """Predicts the velocity of noised latents, given text states and the pooled text."""

    Config = MMDiTConfig

    def __init__(self, config: MMDiTConfig, *, rngs):
        self.config = config
        self.remat, self.gather = "none", None  # as of the UNet
        self.pos_embed = PatchEmbed(config, rngs=rngs)
        self.time_text_embed = TimeTextEmbedding(config, rngs=rngs)
        self.context_embedder = nnx.Linear(config.joint_attention_dim, config.width, rngs=rngs)
        blocks = range(config.num_layers)
        self.transformer_blocks = nnx.List([JointTransformerBlock(i, config, rngs=rngs) for i in blocks])
        self.norm_out = Modulation(config.width, 2, rngs=rngs)
        self.norm = plain_norm(config.width, rngs=rngs)
        channels = config.in_channels if config.out_channels is None else config.out_channels
        self.proj_out = nnx.Linear(config.width, config.patch_size**2 * channels, rngs=rngs)

    @staticmethod
    def constants(config: MMDiTConfig) -> dict[str, np.ndarray]:
        """What among its parameters is no weight, by name."""
        base = config.sample_size // config.patch_size
        return {"pos_embed.pos_embed": position_embedding(config.width, config.pos_embed_max_size, base)}

    def __call__(self, z_t, t, cond, mask=None, text_embeds=None, time_ids=None):
        """One evaluation.

        Args:
            z_t: [B, h, w, C] noised latents; h and w divisible by the patch size.
            t: [B] timesteps, sigma times the number of them.
            cond: [B, S, D] text states. mask: [B, S] bool, False where a text state is hidden, or None.
            text_embeds: [B, P], the pooled text. time_ids: of XL alone; not read.

        Returns:
            [B, h, w, C] the velocity, in the weights' dtype.
        """
        patch, (B, h, w, _) = self.config.patch_size, z_t.shape
        if h % patch or w % patch:
            raise ValueError(f"latents of {h}x{w}: the transformer needs multiples of {patch}")
        dtype = self.proj_out.bias.dtype  # a kernel may be quantised
        x, text = self.pos_embed(z_t.astype(dtype)), self.context_embedder(cond.astype(dtype))
        vector = self.time_text_embed(t, text_embeds.astype(dtype))
        if mask is not None:
            mask = jnp.concatenate([jnp.ones(x.shape[:2], bool), mask], axis=1)
        run = runner(self.gather, self.remat)
        for block in self.transformer_blocks:
            x, text = run(block, x, text, vector, mask)
        scale, shift = self.norm_out(vector)
        x = run(self.proj_out, self.norm(x) * (1 + scale) + shift)  # whole too: its outputs are taken apart
        x = x.reshape(B, h // patch, w // patch, patch, patch, -1).swapaxes(2, 3)
        return x.reshape(B, h, w, -1)
