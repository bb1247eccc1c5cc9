"""How far a value's token moves a prediction: beside the equations."""

import jax
import jax.numpy as jnp
import numpy as np

from livo_jax import diffusion
from livo_jax.models.weights import split
from livo_jax.training.batch import draw_noise
from livo_jax.training.effects import effect, make_effects


def test_effects_are_how_far_the_value_moves_predictions(small):
    """Of aligned images at each timestep, beside the equations."""
    sd, networks, frozen, batch = small
    params = split(sd.text_encoder)[1]
    batch = batch._replace(**{name: getattr(batch, name)[:2] for name in ("value_prompt_ids", "prompt_ids", "aligned")})
    key = jax.random.key(3)
    told, effects = jax.jit(make_effects(networks))(params, frozen, batch, key)
    noise = draw_noise(key, (2, *sd.latent_shape), (0, 1000))
    assert told.tolist() == [50 + 100 * k for k in range(10)] and effects.shape == (10, 2)

    @jax.jit
    def expected(t):
        mean, logvar = sd.vae.encode(batch.aligned)
        z = sd.vae.config.scale(mean + jnp.exp(logvar / 2) * noise.aligned)
        z_t = diffusion.add_noise(sd.schedule, z, noise.eps, jnp.full(2, t))
        c, u = sd.text_encoder(batch.prompt_ids).last_hidden_state, sd.text_encoder(batch.value_prompt_ids).pooled
        with_value, without = (
            sd.unet(z_t, jnp.full(2, t), cond) for cond in (jnp.concatenate([u[:, None], c], axis=1), c)
        )
        return jnp.sqrt(jnp.mean((with_value - without) ** 2, (1, 2, 3)))

    for k in (0, 7):
        np.testing.assert_allclose(effects[k], expected(int(told[k])), rtol=1e-3)


def test_an_effect_is_the_root_of_the_mean_square():
    moved = jnp.zeros((2, 4, 4, 1)).at[0].set(3.0).at[1, :2].set(-4.0)
    assert np.allclose(effect(moved, jnp.zeros_like(moved)), [3.0, np.sqrt(8)])
