"""A step in bfloat16, the dtype of configs/livo.py, of every method that trains."""

import copy
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import tiny
from livo_jax import baselines, sharding, train
from livo_jax.models.weights import split
from livo_jax.step import draw, init_state, make_loss, make_optimizer, make_train_step
from tests.conftest import parts_of


def config_of(method, model):
    """The smoke config of a method, or of livo with a kind of value encoder."""
    if method in ("full", "lora", "token"):
        config = tiny.get_config("smoke")
        config.value_encoder.kind = method
    else:
        config = importlib.import_module(f"configs.baselines.{method}").get_config("tiny:smoke")
    config.model, config.random_weights = str(model), True
    config.train.update(warmup_steps=0, train_embeddings=True)
    return config


METHODS = ["full", "lora", "token", "sft", "dpo", "ipo", "kto", *baselines.UNET]


@pytest.fixture(scope="module")
def models(small):
    """Of the same weights, by dtype."""
    half = copy.copy(small[0])
    for name in ("text_encoder", "unet", "vae"):
        graph, params = split(getattr(half, name))
        setattr(half, name, nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)))
    return {jnp.float32: small[0], jnp.bfloat16: half}


def parts(config, sd):
    """What the step of a method takes: the maker of its loss, graphs, trained and frozen parameters."""
    graphs, frozen = parts_of(sd)
    of_unet = baselines.of_unet(config)
    module = train.load_models(config, sharding.make_mesh(1), sd)[1]
    graphs["update" if of_unet else "value_encoder"], params = split(module)
    return of_unet.make_loss if of_unet else make_loss, graphs, params, frozen


@pytest.mark.parametrize("method", METHODS)
def test_a_step(models, small, method):
    """What it trains stays in float32, finite, and moves; what it merges has the UNet's dtype.

    The loss of value encoders and of the UNet's methods is that in float32 but for bfloat16's 8 bits.
    """
    config, batch, sd = config_of(method, small[0].root), small[3], models[jnp.bfloat16]
    loss_of, graphs, params, frozen = parts(config, sd)
    scale, tx = sd.vae.config.scaling_factor, make_optimizer(config)
    step = jax.jit(make_train_step(graphs, sd.schedule, tx, config, scale, make_loss=loss_of))
    state, metrics = step(init_state(params, tx), frozen, batch)
    assert all(np.isfinite(x) for x in metrics.values()) and metrics["grad_norm"] > 0
    before, after = jax.tree.leaves(params), jax.tree.leaves(state["params"])
    assert {x.dtype for x in before + after} == {jnp.dtype(jnp.float32)} and all(np.isfinite(x).all() for x in after)
    assert any((a != b).any() for a, b in zip(before, after))
    if method in baselines.UNET:
        merged = split(nnx.merge(graphs["update"], state["params"]).merged(sd.unet))[1]
        assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    if method not in ("full", *baselines.UNET):  # those of value encoders differ in what these compare
        return
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    loss_of, graphs, params, frozen = parts(config, models[jnp.float32])
    loss = jax.jit(loss_of(graphs, sd.schedule, config, scale))
    drawn = draw(key, (8, *sd.latent_shape), config.loss.timesteps)
    assert metrics["loss"] == pytest.approx(float(loss(params, frozen, batch | drawn)[0]), rel=0.03)
