"""Guidances: how the predictions of an image's rows become one."""

import dataclasses

import jax.numpy as jnp

STEPS = 50  # of the sampler for which guidances' warm-ups are told


@dataclasses.dataclass(frozen=True)
class Guidance:
    """What the guidances of generate that edit a prediction share: a warm-up, and a momentum.

    warmup: delta, the steps before it takes effect. momentum: s_m, and beta: beta_m. scale and threshold are as the
    guidance has them. Those of two kinds are never equal: a compiled program is found by its guidance.
    """

    scale: float
    warmup: int
    threshold: float
    momentum: float
    beta: float

    def of_steps(self, steps: int) -> "Guidance":
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
