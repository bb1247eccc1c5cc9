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
            prompt, negative: predictions [B, h, w, C] float32 for the prompt and the negative prompt.
            others: a list of R - 2 further predictions of that shape. weights: [B, R - 2] float32, theirs.
            carried: what this step carries.
        """


@dataclasses.dataclass(frozen=True)
class ClassifierFree(Guidance):
    """Classifier-free guidance (Ho & Salimans 2022), away from the negative prompt."""

    def __call__(self, prompt, negative, others, weights, guidance_scale, carried):
        return negative + guidance_scale * (prompt - negative), carried


@dataclasses.dataclass(frozen=True)
class Dosed(ClassifierFree):
    """Classifier-free guidance, and for each further row the effect of its value, times the value's strength."""

    def __call__(self, prompt, negative, others, weights, guidance_scale, carried):
        guided, carried = super().__call__(prompt, negative, others, weights, guidance_scale, carried)
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
