"""What a training step takes: pairs, and the noise that it draws for them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

SIDES = ("aligned", "violating")  # the images of a pair


class Batch(NamedTuple):
    """B preference pairs as data.batches reads them, numpy or jax arrays. Columns that a config does not want are None.

    value_prompt_ids: [B, L] int32, of XL [B, 2, L], of "value, prompt": what the value encoder reads.
    prompt_ids: the same of the prompts. aligned, violating: [B, H, W, 3] float32 in [-1, 1], the images.
    prompt_states, text_embeds: from a cache, in the place of prompt_ids: [B, L, D] and, of XL, [B, P].
    aligned_moments, violating_moments: from a cache, in the place of images: [B, h, w, 2C], mean and log-variance of
        the VAE's posterior.
    beside_prompt_ids: as value_prompt_ids, of a second value. beside: [B] bool, whether it stands beside the first.
    anchor: [B] bool, whether the prompt is one that the value should leave alone. harm: [B] bool, whether the value is
        a harm.
    """

    value_prompt_ids: jax.Array
    prompt_ids: jax.Array | None = None
    aligned: jax.Array | None = None
    violating: jax.Array | None = None
    prompt_states: jax.Array | None = None
    text_embeds: jax.Array | None = None
    aligned_moments: jax.Array | None = None
    violating_moments: jax.Array | None = None
    beside_prompt_ids: jax.Array | None = None
    beside: jax.Array | None = None
    anchor: jax.Array | None = None
    harm: jax.Array | None = None


class Noise(NamedTuple):
    """What a step draws for the latents of B pairs.

    aligned, violating: [B, h, w, C] float32, of the VAE's posterior of each image.
    eps: [B, h, w, C] float32, of the forward process; t: [B] int32, its timesteps. Both images of a pair have the same.
    """

    aligned: jax.Array
    violating: jax.Array
    eps: jax.Array
    t: jax.Array


DENSITIES = ("uniform", "logit_normal")  # of timesteps: config.loss.timestep_density


def draw_noise(key, shape: tuple, timesteps: tuple[int, int], density: str = "uniform") -> Noise:
    """The noise of a step for latents of `shape` [B, h, w, C], with t of first .. last - 1.

    The key is split once: none serves two purposes.

    density: one of DENSITIES. The second has the logit of where t lies between first and last from N(0, 1), so that
        most are about the middle (Esser et al. 2024, section 3.1).
    """
    *keys, key_t = jax.random.split(key, 4)
    normal = [jax.random.normal(key, shape) for key in keys]
    if density == "uniform":
        return Noise(*normal, jax.random.randint(key_t, shape[:1], *timesteps))
    first, last = timesteps
    place = jax.nn.sigmoid(jax.random.normal(key_t, shape[:1])) * (last - first)
    return Noise(*normal, jnp.clip(first + place.astype(jnp.int32), first, last - 1))
