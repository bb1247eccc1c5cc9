"""Diffusion-DPO on the UNet (Wallace et al. 2024, eq. 14), by low-rank updates of its attention (Hu et al. 2022).

The policy is the UNet with the updates, the reference the one without; there are no value tokens, so that one UNet
follows all values at once. It learns to prefer each pair's aligned image under the prompt alone.
"""

import jax.numpy as jnp
from flax import nnx

from livo_jax import sharding
from livo_jax.models import low_rank
from livo_jax.training import losses
from livo_jax.training.step import noised, prompt_states

KINDS = ("bias", "harm")
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class Update(nnx.Module):
    """Untrained updates of config.dpo_unet.rank and alpha, for the UNet of a StableDiffusion."""

    RULES = sharding.WHOLE

    def __init__(self, config, sd, rngs):
        c = config.dpo_unet
        self.scale = c.alpha / c.rank
        self.updates = low_rank.updates(sd.unet, TARGETS, c.rank, rngs)

    def applied(self, unet):
        """The UNet with the updates beside its weights."""
        return low_rank.updated(unet, self.updates, self.scale)


def make_loss(graphs: dict, schedule, config, scaling_factor: float, time_ids=None):
    """losses.dpo of a batch; as step.make_loss, with graphs["update"]."""

    def loss(params, frozen, batch):
        unet = nnx.merge(graphs["unet"], frozen["unet"])
        policy = nnx.merge(graphs["update"], params).applied(unet)
        z_t, t, target = noised(graphs, schedule, scaling_factor, frozen, batch)
        twice = lambda x: x if x is None else jnp.repeat(x, 2, axis=0)
        c, text_embeds = map(twice, prompt_states(graphs, frozen, batch))
        predict = lambda unet: unet(z_t, t, c, None, text_embeds, time_ids)
        errors = lambda unet: losses.denoising_error(predict(unet), target).reshape(-1, 2).T
        return losses.dpo(*errors(policy), *errors(unet), beta=config.loss.beta, T=schedule.num_timesteps)

    return loss
