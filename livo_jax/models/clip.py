"""CLIP (Radford et al. 2021): its text transformer is frozen text encoder and value encoder; the whole is a judge."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from livo_jax.models.attention import attention
from livo_jax.models.layers import ACTIVATIONS, PublishedConfig, layer_norm, runner

IGNORED = frozenset(  # published fields that do not change the computation
    "architectures attention_dropout bos_token_id dropout dtype initializer_factor initializer_range"
    " pad_token_id projection_dim torch_dtype transformers_version chunk_size_feed_forward id2label label2id"
    " max_length min_length num_beams num_beam_groups num_return_sequences output_scores problem_type"
    " repetition_penalty length_penalty temperature top_k top_p typical_p tie_word_embeddings"
    " diversity_penalty return_dict use_bfloat16 output_attentions output_hidden_states attn_implementation"
    " livo".split()
)


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(PublishedConfig):
    """The fields of a published text_encoder/config.json that change the computation."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    CAUSAL = True  # a token sees itself and those before it
    FIXED = {"model_type": "clip_text_model"}
    IGNORED = IGNORED

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act={self.hidden_act!r}: choose from {', '.join(ACTIVATIONS)}")

    @property
    def towers(self) -> tuple["CLIPTextConfig", ...]:
        return (self,)


@dataclasses.dataclass(frozen=True)
class CLIPTextConfigWithProjection(CLIPTextConfig):
    projection_dim: int = 512

    IGNORED = IGNORED - {"projection_dim"}


@dataclasses.dataclass(frozen=True)
class CLIPTextConfigs:
    """Of text transformers side by side."""

    towers: tuple[CLIPTextConfig, ...]

    @property
    def hidden_size(self) -> int:
        return sum(config.hidden_size for config in self.towers)

    @property
    def max_position_embeddings(self) -> int:
        return min(config.max_position_embeddings for config in self.towers)


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(PublishedConfig):
    """The fields of the vision_config in a published config.json that change the computation."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    CAUSAL = False
    FIXED = {"model_type": "clip_vision_model"}
    IGNORED = IGNORED
    __post_init__ = CLIPTextConfig.__post_init__


@dataclasses.dataclass(frozen=True)
class CLIPConfig(PublishedConfig):
    """A published config.json of both transformers."""

    text_config: CLIPTextConfig = CLIPTextConfig()
    vision_config: CLIPVisionConfig = CLIPVisionConfig()
    projection_dim: int = 512

    FIXED = {"model_type": "clip"}
    IGNORED = IGNORED | {"logit_scale_init_value"}

    @classmethod
    def from_json(cls, published: dict):
        rest = dict(published)

        def part(name, kind):  # old files have a second one beside it, which counts where the two differ
            return kind.from_json((rest.pop(name, None) or {}) | (rest.pop(f"{name}_dict", None) or {}))

        text, vision = part("text_config", CLIPTextConfig), part("vision_config", CLIPVisionConfig)
        return dataclasses.replace(super().from_json(rest), text_config=text, vision_config=vision)


class TextOutput(NamedTuple):
    last_hidden_state: jax.Array  # [B, L, D] after the final layer norm
    pooled: jax.Array  # [B, D] its row at the end-of-text token
    penultimate: jax.Array  # [B, L, D] what the last layer reads
    text_embeds: jax.Array | None = None  # [B, P] the pooled row, projected, where the model projects it


def end_of_text(ids, config: CLIPTextConfig):
    """Where the end token of ids [B, L] is, [B] int32.

    Published SD files say eos_token_id=2 though their end token is the vocabulary's last id: the position of the
    largest id is then what the original computes.
    """
    return ids.argmax(-1) if config.eos_token_id == 2 else (ids == config.eos_token_id).argmax(-1)


def first_ids(ids):
    """The ids [..., L] of the first tokenizer: of ids [B, L] themselves, of [B, 2, L] those [:, 0]."""
    return ids if ids.ndim == 2 else ids[:, 0]


def widened(tokens, width: int):
    """Tokens [..., D] with zeros up to a width: states of CLIP, and value tokens, as Stable Diffusion 3 has them."""
    return jnp.pad(tokens, [(0, 0)] * (tokens.ndim - 1) + [(0, width - tokens.shape[-1])])


class VisionOutput(NamedTuple):
    last_hidden_state: jax.Array  # [B, 1 + h w, D] of the class token and the patches, before the last layer norm
    pooled: jax.Array  # [B, D] the class token's row after it


class CLIPTextEmbeddings(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, rngs):
        self.token_embedding = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.position_embedding = nnx.Embed(config.max_position_embeddings, config.hidden_size, rngs=rngs)

    def __call__(self, ids):
        # Indexed, for nnx.Embed would cast to the dtype that it was made with.
        return self.token_embedding.embedding[ids] + self.position_embedding.embedding[: ids.shape[1]]


class CLIPVisionEmbeddings(nnx.Module):
    def __init__(self, config: CLIPVisionConfig, *, rngs):
        patch = config.patch_size
        self.class_embedding = nnx.Param(jnp.zeros(config.hidden_size))
        self.patch_embedding = nnx.Conv(
            config.num_channels, config.hidden_size, (patch, patch), patch, padding="VALID", use_bias=False, rngs=rngs
        )
        positions = 1 + (config.image_size // patch) ** 2
        self.position_embedding = nnx.Embed(positions, config.hidden_size, rngs=rngs)

    def __call__(self, pixels):
        patches = self.patch_embedding(pixels.astype(self.patch_embedding.kernel.dtype))
        patches = patches.reshape(len(patches), -1, patches.shape[-1])
        first = jnp.broadcast_to(self.class_embedding[...], patches[:, :1].shape)
        return jnp.concatenate([first, patches], axis=1) + self.position_embedding.embedding[...]


class CLIPAttention(nnx.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, *, rngs):
        self.heads, self.causal = config.num_attention_heads, config.CAUSAL
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nnx.Linear(config.hidden_size, config.hidden_size, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(attention(q, k, v, self.heads, causal=self.causal))


class CLIPMLP(nnx.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, *, rngs):
        self.act = ACTIVATIONS[config.hidden_act]
        self.fc1 = nnx.Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.fc2 = nnx.Linear(config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x):
        return self.fc2(self.act(self.fc1(x)))


class CLIPEncoderLayer(nnx.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, *, rngs):
        self.layer_norm1 = layer_norm(config.hidden_size, config.layer_norm_eps, rngs=rngs)
        self.self_attn = CLIPAttention(config, rngs=rngs)
        self.layer_norm2 = layer_norm(config.hidden_size, config.layer_norm_eps, rngs=rngs)
        self.mlp = CLIPMLP(config, rngs=rngs)

    def __call__(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nnx.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, *, rngs):
        self.layers = nnx.List([CLIPEncoderLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.gather = None  # of who shards it, as of the UNet

    def __call__(self, x):
        """The states after the last layer, and before it."""
        run = runner(self.gather)
        for layer in self.layers:
            before, x = x, run(layer, x)
        return x, before


class CLIPTextModel(nnx.Module):
    """The text transformer; without the `text_model.` prefix that some published files carry."""

    Config = CLIPTextConfig

    def __init__(self, config: CLIPTextConfig, *, rngs):
        self.config = config
        self.embeddings = CLIPTextEmbeddings(config, rngs=rngs)
        self.encoder = CLIPEncoder(config, rngs=rngs)
        self.final_layer_norm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs=rngs)

    @property
    def towers(self) -> tuple["CLIPTextModel", ...]:
        return (self,)

    @property
    def encoders(self) -> tuple[nnx.Module, ...]:
        """All that it reads with: the towers, and what else is no CLIP."""
        return self.towers

    def __call__(self, ids) -> TextOutput:
        """Encodes token ids [B, L] int32, L at most `max_position_embeddings`."""
        x, before = self.encoder(self.embeddings(ids))
        x = self.final_layer_norm(x)
        end = end_of_text(ids, self.config)
        return TextOutput(x, jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0], before)


class CLIPTextModelWithProjection(CLIPTextModel):
    """The text transformer and its projection to the space that CLIP compares in: Stable Diffusion XL's second."""

    Config = CLIPTextConfigWithProjection

    def __init__(self, config: CLIPTextConfigWithProjection, *, rngs):
        super().__init__(config, rngs=rngs)
        self.text_projection = nnx.Linear(config.hidden_size, config.projection_dim, use_bias=False, rngs=rngs)

    def __call__(self, ids) -> TextOutput:
        out = super().__call__(ids)
        return out._replace(text_embeds=self.text_projection(out.pooled))


def outputs_of(towers, ids) -> list[TextOutput]:
    """What each of several text transformers gives of token ids [B, n, L] int32, those of its own tokenizer.

    A row may be filled up to the longest, T5's: each tower is given what it can read.
    """
    return [tower(ids[:, k, : tower.config.max_position_embeddings]) for k, tower in enumerate(towers)]


class CLIPTextModels(nnx.Module):
    """Stable Diffusion XL's two text transformers as one (Podell et al. 2023, section 2.1), D = D_1 + D_2 wide."""

    def __init__(self, text_encoder: CLIPTextModel, text_encoder_2: CLIPTextModel):
        self.config = CLIPTextConfigs((text_encoder.config, text_encoder_2.config))
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2

    @property
    def towers(self) -> tuple[CLIPTextModel, ...]:
        return self.text_encoder, self.text_encoder_2

    @property
    def encoders(self) -> tuple[nnx.Module, ...]:
        return self.towers

    def __call__(self, ids) -> TextOutput:
        """Encodes token ids [B, 2, L] int32, each transformer those of its own tokenizer.

        What the UNet attends to, here the last_hidden_state, are the penultimate states of both.
        """
        one, two = outputs_of(self.towers, ids)
        states = jnp.concatenate([one.penultimate, two.penultimate], axis=-1)
        return TextOutput(states, jnp.concatenate([one.pooled, two.pooled], axis=-1), states, two.text_embeds)


class CLIPVisionModel(nnx.Module):
    """The vision transformer."""

    Config = CLIPVisionConfig

    def __init__(self, config: CLIPVisionConfig, *, rngs):
        self.config = config
        self.embeddings = CLIPVisionEmbeddings(config, rngs=rngs)
        self.pre_layrnorm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs=rngs)  # its published name
        self.encoder = CLIPEncoder(config, rngs=rngs)
        self.post_layernorm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs=rngs)

    def __call__(self, pixels) -> VisionOutput:
        """Encodes normalised images [B, image_size, image_size, 3] float."""
        x, _ = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return VisionOutput(x, self.post_layernorm(x[:, 0]))


def unit(x):
    """Features [..., P] at length 1: their products are cosines."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class CLIPModel(nnx.Module):
    """Both transformers, with what compares an image and a text."""

    Config = CLIPConfig

    def __init__(self, config: CLIPConfig, *, rngs):
        self.config = config
        text, vision, width = config.text_config, config.vision_config, config.projection_dim
        self.text_model = CLIPTextModel(text, rngs=rngs)
        self.vision_model = CLIPVisionModel(vision, rngs=rngs)
        self.text_projection = nnx.Linear(text.hidden_size, width, use_bias=False, rngs=rngs)
        self.visual_projection = nnx.Linear(vision.hidden_size, width, use_bias=False, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.zeros(()))

    def text_features(self, ids):
        """Features [T, P] of token ids [T, L] int32."""
        return self.text_projection(self.text_model(ids).pooled)

    def image_features(self, pixels):
        """Features [B, P] of normalised images [B, image_size, image_size, 3] float."""
        return self.visual_projection(self.vision_model(pixels).pooled)

    def logits(self, image_features, text_features):
        """Scaled cosines [B, T] of features [B, P] and [T, P]."""
        return jnp.exp(self.logit_scale[...]) * unit(image_features) @ unit(text_features).T
