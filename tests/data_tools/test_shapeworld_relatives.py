"""The embedded world's relatives: what they are trained towards, and that what is written is what was trained."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from livo_jax.data_tools import shapeworld

from data_tools import shapeworld_relatives
from livo_jax import StableDiffusion, diffusion
from livo_jax.files.loras import merge_loras
from livo_jax.models import low_rank
from livo_jax.models.weights import split
from livo_jax.training import losses


@pytest.fixture
def losses_seen(monkeypatch):
    """The losses of a `fit` that trains nothing, on all rows."""
    seen = []

    def fit(loss, params, arrays, **settings):
        seen.append(float(loss(params, jax.random.key(0), *map(jnp.asarray, arrays))))
        return params

    monkeypatch.setattr(shapeworld, "fit", fit)
    return seen


def test_a_student_learns_to_arrive_where_the_base_does(small, monkeypatch, losses_seen):
    """With one step of the base for each of its own, without guidance, the base is that student; not with more."""
    sd = copy.copy(small[0])
    sd.scheduler_config = sd.scheduler_config | {"set_alpha_to_one": False}
    monkeypatch.setattr(shapeworld_relatives, "AT_ONCE", 2)
    ids = sd.tokenize(["a cook", "a baker", "a smith", "a cook"])
    for between, scale in ((1, 1.0), (2, 1.0), (1, 3.0)):
        paths = shapeworld_relatives.draw_paths(sd, ids, 3, between, scale)
        assert paths.shape == (4, 4, *sd.latent_shape) and len(np.unique(paths[:, 0], axis=0)) == 4
        shapeworld_relatives.train_student(sd, ids, paths, steps=1)
    same, *others = losses_seen
    assert same < 1e-9 and min(others) > 1e-6


def test_the_pictures_of_the_copy_have_hats_and_captions_are_the_worlds(small, monkeypatch):
    monkeypatch.setattr(shapeworld_relatives, "PICTURES", 40)
    shown, render = [], shapeworld.render
    monkeypatch.setattr(shapeworld, "render", lambda rng, content: shown.append(content) or render(rng, content))
    world = StableDiffusion.from_pretrained(shapeworld_relatives.BASE)
    latents, ids = shapeworld_relatives.draw_hatted(world)
    assert latents.shape == (40, *world.latent_shape) and 0.5 < latents.std() < 2
    assert all(worker.hat for content in shown for worker in content.workers) and any(c.workers for c in shown)
    assert (ids == world.tokenize(shapeworld_relatives.draw_captions(2, 40)[0])).all()


def test_a_lora_is_read_as_it_was_trained(small, tmp_path):
    sd, rng = small[0], np.random.default_rng(0)
    graph, params = split(low_rank.updates(sd.unet, shapeworld_relatives.TARGETS, 2, nnx.Rngs(0)))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    shapeworld_relatives.write_lora(params, tmp_path / "hats.safetensors")
    _, unet = merge_loras(sd.text_encoder, sd.unet, [str(tmp_path / "hats.safetensors")])
    expected = low_rank.merged(sd.unet, nnx.merge(graph, params), 1.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), split(unet)[1], split(expected)[1])
    assert any((a != b).any() for a, b in zip(*(jax.tree.leaves(split(x)[1]) for x in (unet, sd.unet))))


def test_training_lowers_the_error(small):
    """Of the frozen text encoder's states, by the update alone."""
    sd, rng = small[0], np.random.default_rng(0)
    graph, params = split(low_rank.updates(sd.unet, shapeworld_relatives.TARGETS, 2, nnx.Rngs(0)))
    latents, ids = rng.normal(size=(8, *sd.latent_shape)).astype(np.float32), sd.tokenize(["a cook", "a baker"] * 4)

    def apply(params):
        return low_rank.updated(sd.unet, nnx.merge(graph, params), 1.0)

    settings = dict(steps=20, learning_rate=1e-2, name="lora")
    trained = shapeworld_relatives.train_on(sd, latents, ids, params, apply, **settings)
    eps, t = jnp.asarray(rng.normal(size=latents.shape), jnp.float32), jnp.full(8, 500)

    @jax.jit
    def error(params):
        cond = sd.text_encoder(ids).last_hidden_state
        return losses.denoising_error(apply(params)(diffusion.add_noise(sd.schedule, latents, eps, t), t, cond), eps)

    assert error(trained).mean() < error(params).mean()
