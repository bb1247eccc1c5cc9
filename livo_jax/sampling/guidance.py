"""Guidances: how the UNet's predictions for an image's rows become one."""

import abc
import dataclasses

import jax.numpy as jnp

STEPS = 50  # of the sampler for which guidances' warm-ups are told


class Guidance(abc.ABC):
    """Makes one prediction of those for the prompt, the negative prompt and the further rows of an image.

    It is hashable, and those of two kinds are never equal: a compiled program is found by its guidance.
    """

    def start(self, z):
        """What the first step carries, for latents z [B, h, w, C]."""
        return None

    @abc.abstractmethod
    def __call__(self, prompt, negative, others, weights, guidance_scale, carried):
        """The guided prediction, and what the next step carries.

        Args:
            prompt, negative: predictions [B, h, w, C] float32 for the prompt and the negative prompt, which is None
                where no image of the batch is guided.
            others: a list of E further predictions of that shape. weights: [B, E] float32, theirs.
            guidance_scale: a float32, or [B, 1, 1, 1] of them. At most 1 is no guidance.
            carried: what this step carries.
        """


@dataclasses.dataclass(frozen=True)
class ClassifierFree(Guidance):
    """Classifier-free guidance (Ho & Salimans 2022), away from the negative prompt.

    A scale of at most 1 leaves the prediction for the prompt as it is, as diffusers' pipelines do.
    """

    def __call__(self, prompt, negative, others, weights, guidance_scale, carried):
        if negative is None:
            return prompt, carried
        return jnp.where(guidance_scale > 1, negative + guidance_scale * (prompt - negative), prompt), carried


@dataclasses.dataclass(frozen=True)
class Dosed(ClassifierFree):
    """Classifier-free guidance, and for each further row the effect of its value, times the value's strength."""

    def __call__(self, prompt, negative, others, weights, guidance_scale, carried):
        guided, carried = super().__call__(prompt, negative, others, weights, guidance_scale, carried)
        guidance_scale = jnp.maximum(guidance_scale, 1.0)  # so that a strength of 1 is the prediction with the value
        for strength, with_value in zip(weights.T, others):
            guided += strength[:, None, None, None] * guidance_scale * (with_value - prompt)
        return guided, carried


@dataclasses.dataclass(frozen=True)
class EditGuidance(Guidance):
    """What the guidances that edit a prediction share: a warm-up, and a momentum. Their further rows are the edits.

    warmup: delta, the steps before it takes effect. momentum: s_m, and beta: beta_m. scale and threshold are as the
    guidance has them.
    """

    scale: float
    warmup: int
    threshold: float
    momentum: float
    beta: float

    def of_steps(self, steps: int) -> "EditGuidance":
        """That with the same share of so many steps to warm up."""
        return dataclasses.replace(self, warmup=round(self.warmup * steps / STEPS))

    def start(self, z):
        return jnp.zeros((), jnp.int32), jnp.zeros_like(z)

    def carry(self, gamma, carried):
        """An edit with its momentum, once it is warm; and the next step and its momentum. `carried`: this step's."""
        step, nu = carried
        gamma = gamma + self.momentum * nu
        nu = self.beta * nu + (1 - self.beta) * gamma
        return jnp.where(step >= self.warmup, gamma, 0.0), (step + 1, nu)
