"""Value encoders of each kind, on tiny models of XL and 3."""

import jax
import numpy as np
import optax
import torch
from flax import nnx

from configs import tiny
from livo_jax import sharding, value_encoders
from livo_jax.export import export
from livo_jax.models.weights import split
from livo_jax.sampling import generate
from livo_jax.value_encoders.base import set_reading
from livo_jax.values.principles import text_hash

PROMPTS = ["a photo of a baker", "a cook at work"]
VALUE, OTHER = "shape equality", "colour equality"


def of_kind(config, kind: str, **settings):
    config = config.copy_and_resolve_references()
    config.value_encoder.update(kind=kind, **settings)
    return config


def config_of(published):
    """That of a run on a published directory, which samples in three steps."""
    config = tiny.get_config()
    config.model, config.principles, config.data.attributes = str(published), ("shape", "colour"), 0.0
    config.value_encoder.update(rank=3, alpha=6.0, tokens=2)
    config.sampling.update(sampler="euler", steps=3, guidance_scale=3.0)
    return config


def at_once(method, *given):
    """What a module's method returns, by one program: called as it is, each of its operations is one."""
    return nnx.jit(method.__func__)(method.__self__, *given)


def make_all(sd, config) -> dict:
    """kind -> a value encoder of it, as after some training."""
    rng, made = np.random.default_rng(0), {}
    for kind in value_encoders.KINDS:
        graph, params = split(value_encoders.start(of_kind(config, kind), sd, sharding.make_mesh()))
        scale = 3.0 if kind == "token" else 0.1
        noise = jax.tree.map(lambda x: rng.normal(0, scale, x.shape).astype(np.float32), params)  # noqa: B023
        made[kind] = nnx.merge(graph, jax.jit(optax.tree.add)(params, noise))
    return made


def that_moves_pooled(made, config):
    """The same value encoder, which moves the pooled text; config: of its kind."""
    return set_reading(nnx.merge(*split(made)), of_kind(config, config.value_encoder.kind, pooled=True))


def assert_moves_pooled(sd, made, config):
    """By what training changed of a reading, projected as the model does; nothing before.

    made: a value encoder after some training, of the config's kind. Returns the same with the pooled text moved.
    """
    ids = sd.tokenize([f"{value}, {prompt}" for value, prompt in zip((VALUE, OTHER), PROMPTS)])
    trained = that_moves_pooled(made, config)
    untrained = that_moves_pooled(value_encoders.start(config, sd, sharding.make_mesh()), config)
    np.testing.assert_allclose(at_once(untrained.pooled_shift, ids, sd.text_encoder), 0.0, atol=1e-6)
    assert made.pooled_shift(ids, sd.text_encoder) is None

    tokens, start = (np.asarray(at_once(it.tokens, ids, sd.text_encoder))[:, 0] for it in (trained, untrained))
    towers = sd.text_encoder.towers
    parts = zip(np.split(tokens - start, [towers[0].config.hidden_size], axis=1), towers)
    expected = [part @ tower.text_projection.kernel[...] for part, tower in parts if hasattr(tower, "text_projection")]
    shift = np.asarray(at_once(trained.pooled_shift, ids, sd.text_encoder))
    np.testing.assert_allclose(shift, np.concatenate(expected, axis=1), atol=1e-4)
    assert shift.shape == (2, sd.family.pooled_width) and np.abs(shift).max() > 0.1
    return trained


def channels_first(noise):
    return torch.tensor(noise.transpose(0, 3, 1, 2))


def assert_export_draws_the_same(sd, value_encoder, config, published, out, drawing: dict, **parts):
    """As JAX from the same noise, values of several strengths, and the export is read again.

    config: with the kind of the value encoder. drawing: settings of sd.generate, those of the config among them. parts:
    what else the pipeline is given.
    """
    from diffusers import DiffusionPipeline

    export.export(out, sd, value_encoder, config)
    kind = config.value_encoder.kind
    again = value_encoders.start(of_kind(config, kind, start=str(out)), sd, sharding.make_mesh())
    jax.tree.map(np.testing.assert_array_equal, split(again)[1], split(value_encoder)[1])
    pipeline = DiffusionPipeline.from_pretrained(published, custom_pipeline=str(out), trust_remote_code=True, **parts)
    pipeline.set_progress_bar_config(disable=True)
    noise = np.stack([generate.initial_noise(5, text_hash(p), 0, sd.latent_shape) for p in PROMPTS])
    values, settings = [[VALUE, OTHER], OTHER], dict(strength={VALUE: 0.5})
    theirs = pipeline(PROMPTS, values, latents=channels_first(noise), output_type="np", **settings)
    ours = sd.generate(PROMPTS, values, value_encoder, seed=5, **settings, **drawing)
    assert np.abs(ours - theirs.images * 255).max() < 1.0
    base = sd.generate(PROMPTS, seed=5, **drawing)
    assert (np.abs(ours.astype(int) - base).max((1, 2, 3)) > 1).all()
