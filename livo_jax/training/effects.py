"""How far a value's token moves a prediction."""

import jax
import jax.numpy as jnp
import numpy as np

from livo_jax.training.batch import SIDES, draw_noise
from livo_jax.training.losses import denoising_error
from livo_jax.training.objective import Networks, add_noise, condition, moments, prompt_states

PLACES = np.arange(0.05, 1, 0.1)  # among the timesteps


def effect(with_value, without):
    """The root of the mean square between predictions [B, h, w, C]: [B] float32."""
    return jnp.sqrt(denoising_error(with_value, without))


def make_effects(networks: Networks):
    """The function effects(params, frozen, batch, key) -> (told [K], effects [K, B]), to be jitted.

    Of aligned images: the timesteps as the model is told them, and how far the value encoder's token moves its
    prediction at each.
    """
    T = networks.schedule.num_timesteps

    def effects(params, frozen, batch, key):
        value_encoder = networks.merge("trained", params)
        text_encoder = networks.merge("text_encoder", frozen["text_encoder"])
        given = condition(value_encoder, text_encoder, batch, *prompt_states(networks, frozen, batch))
        mean, logvar = moments(networks, frozen, batch, "aligned")
        batch = batch._replace(aligned_moments=jnp.concatenate([mean, logvar], axis=-1))  # encoded once
        noise = draw_noise(key, mean.shape, (0, T))

        def at(t):
            noise_at_t = noise._replace(t=jnp.full_like(noise.t, t))
            z_t, told, _ = add_noise(networks, frozen, batch, noise_at_t, SIDES[:1])
            predicted = [networks.apply("unet", frozen, z_t, told, *of, networks.time_ids) for of in given]
            return told[0].astype(jnp.float32), effect(*predicted)

        return jax.lax.map(at, jnp.asarray(PLACES * T, jnp.int32))

    return effects
