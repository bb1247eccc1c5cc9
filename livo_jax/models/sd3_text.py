"""What Stable Diffusion 3 reads of a text: the states of two CLIPs and, after them, of T5 (Esser et al. 2024)."""

import jax.numpy as jnp
from flax import nnx

from livo_jax.models.clip import CLIPTextConfigs, CLIPTextModelWithProjection, TextOutput, outputs_of, widened
from livo_jax.models.t5 import T5EncoderModel


class SD3TextModels(nnx.Module):
    """Its text encoders as one. What value encoders are of, its `config` and `towers`, are the two CLIPs alone.

    Args:
        text_encoder_3: None, and its states are zeros.
        width: D, of the states. length: how many T5 has.
    """

    def __init__(
        self,
        text_encoder: CLIPTextModelWithProjection,
        text_encoder_2: CLIPTextModelWithProjection,
        text_encoder_3: T5EncoderModel | None,
        width: int,
        length: int,
    ):
        self.config = CLIPTextConfigs((text_encoder.config, text_encoder_2.config))
        self.text_encoder, self.text_encoder_2, self.text_encoder_3 = text_encoder, text_encoder_2, text_encoder_3
        self.width, self.length = width, length

    @property
    def towers(self) -> tuple[CLIPTextModelWithProjection, ...]:
        return self.text_encoder, self.text_encoder_2

    @property
    def encoders(self) -> tuple[nnx.Module, ...]:
        return self.towers if self.text_encoder_3 is None else (*self.towers, self.text_encoder_3)

    def __call__(self, ids) -> TextOutput:
        """Encodes token ids [B, 2, L] int32, or [B, 3, L] with those of T5; each row is filled up to the longest.

        The last_hidden_state [B, L_clip + length, D] is what the transformer attends to: the penultimate states of both
        CLIPs side by side, zeros up to D, and then T5's. The text_embeds are both pooled texts, projected.
        """
        one, two = outputs_of(self.towers, ids)

        def beside(name):
            return jnp.concatenate([getattr(one, name), getattr(two, name)], axis=-1)

        states = widened(beside("penultimate"), self.width)
        if self.text_encoder_3 is None:
            further = jnp.zeros((len(ids), self.length, self.width), states.dtype)
        else:
            further = self.text_encoder_3(ids[:, 2, : self.length]).astype(states.dtype)
        states = jnp.concatenate([states, further], axis=1)
        return TextOutput(states, beside("pooled"), states, beside("text_embeds"))
