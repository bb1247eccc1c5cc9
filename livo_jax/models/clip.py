"""CLIP's text transformer (Radford et al. 2021): the frozen text encoder and the value encoder."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from livo_jax.models.layers import ACTIVATIONS, PublishedConfig, attention, layer_norm


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

    IGNORED = frozenset(
        "architectures attention_dropout bos_token_id dropout dtype initializer_factor initializer_range model_type"
        " pad_token_id projection_dim torch_dtype transformers_version chunk_size_feed_forward id2label label2id"
        " max_length min_length num_beams num_beam_groups num_return_sequences output_scores problem_type"
        " repetition_penalty length_penalty temperature top_k top_p typical_p tie_word_embeddings"
        " diversity_penalty return_dict use_bfloat16".split()
    )

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act={self.hidden_act!r}: choose from {', '.join(ACTIVATIONS)}")


class TextOutput(NamedTuple):
    last_hidden_state: jax.Array  # [B, L, D] after the final layer norm
    pooled: jax.Array  # [B, D] its row at the end-of-text token


class CLIPTextEmbeddings(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, rngs):
        self.token_embedding = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.position_embedding = nnx.Embed(config.max_position_embeddings, config.hidden_size, rngs=rngs)

    def __call__(self, ids):
        # Indexed, for nnx.Embed would cast to the dtype that it was made with.
        return self.token_embedding.embedding[ids] + self.position_embedding.embedding[: ids.shape[1]]


class CLIPAttention(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, rngs):
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nnx.Linear(config.hidden_size, config.hidden_size, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x):
        return self.out_proj(attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=True))


class CLIPMLP(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, rngs):
        self.act = ACTIVATIONS[config.hidden_act]
        self.fc1 = nnx.Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.fc2 = nnx.Linear(config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x):
        return self.fc2(self.act(self.fc1(x)))


class CLIPEncoderLayer(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, rngs):
        self.layer_norm1 = layer_norm(config.hidden_size, config.layer_norm_eps, rngs=rngs)
        self.self_attn = CLIPAttention(config, rngs=rngs)
        self.layer_norm2 = layer_norm(config.hidden_size, config.layer_norm_eps, rngs=rngs)
        self.mlp = CLIPMLP(config, rngs=rngs)

    def __call__(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, rngs):
        self.layers = nnx.List([CLIPEncoderLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class CLIPTextModel(nnx.Module):
    """The text transformer; without the `text_model.` prefix that some published files carry."""

    Config = CLIPTextConfig

    def __init__(self, config: CLIPTextConfig, *, rngs):
        self.config = config
        self.embeddings = CLIPTextEmbeddings(config, rngs=rngs)
        self.encoder = CLIPEncoder(config, rngs=rngs)
        self.final_layer_norm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs=rngs)

    def __call__(self, ids) -> TextOutput:
        """Encodes token ids [B, L] int32, L at most `max_position_embeddings`."""
        x = self.final_layer_norm(self.encoder(self.embeddings(ids)))
        # Published SD files say eos_token_id=2 though their end token is the vocabulary's last id:
        # the position of the largest id is then what the original computes.
        eos = self.config.eos_token_id
        end = ids.argmax(-1) if eos == 2 else (ids == eos).argmax(-1)
        return TextOutput(x, jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0])
