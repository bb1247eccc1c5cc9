"""Diffusion-DPO on the UNet (Wallace et al. 2024, eq. 14), by low-rank updates of its attention (Hu et al. 2022).

The policy is the UNet with the updates, the reference the one without; there are no value tokens, so that one UNet
follows all values at once. It learns to prefer each pair's aligned image under the prompt alone.
"""

import jax.numpy as jnp
from flax import nnx

from livo_jax import sharding
from livo_jax.methods.of_unet import UNetMethod
from livo_jax.models import low_rank
from livo_jax.training import losses
from livo_jax.training.objective import add_noise, prompt_states

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


class DPOUNet(UNetMethod):
    """config.loss.beta is the weight of the divergence from the reference."""

    UNREAD = tuple(name for name in UNetMethod.UNREAD if name != "loss.beta")
    Update = Update
    compares_pairs = True

    def make_loss(self, networks):
        beta, T = self.config.loss.beta, networks.schedule.num_timesteps

        def per_side(x):
            return x if x is None else jnp.repeat(x, 2, axis=0)

        def loss(params, frozen, batch, noise):
            unet = networks.merge("unet", frozen["unet"])
            policy = networks.merge("trained", params).applied(unet)
            z_t, t, target = add_noise(networks, frozen, batch, noise)
            c, text_embeds = map(per_side, prompt_states(networks, frozen, batch))

            def errors(unet):
                eps_hat = unet(z_t, t, c, None, text_embeds, networks.time_ids)
                return losses.denoising_error(eps_hat, target).reshape(-1, 2).T

            return losses.dpo(*errors(policy), *errors(unet), beta=beta, T=T)

        return loss
