"""A step in bfloat16, the dtype of configs/livo.py, of every method that trains."""

import copy
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import tiny
from livo_jax import methods, sharding
from livo_jax.methods import concept_ablation
from livo_jax.models import low_rank
from livo_jax.models.weights import split
from livo_jax.runs import restore
from livo_jax.training.batch import draw_noise
from livo_jax.training.objective import split_models
from livo_jax.training.optimizer import make_optimizer
from livo_jax.training.step import init_state, make_train_step


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


OF_UNET = ["concept_ablation", "dpo_unet"]
METHODS = ["full", "lora", "token", "sft", "dpo", "ipo", "kto", *OF_UNET]


@pytest.fixture(scope="module")
def models(small):
    """Of the same weights, by dtype, on one device: who drew with them before has left them on all."""
    one = sharding.replicated(sharding.make_mesh(1))

    def cast(dtype):
        sd = copy.copy(small[0])
        for name in ("text_encoder", "unet", "vae"):
            graph, params = split(getattr(sd, name))
            setattr(sd, name, nnx.merge(graph, jax.tree.map(lambda x: jax.device_put(x.astype(dtype), one), params)))
        return sd

    return {dtype: cast(dtype) for dtype in (jnp.float32, jnp.bfloat16)}


def parts(config, sd):
    """What the step of a method takes: its loss, networks, trained and frozen parameters."""
    sd, module = restore.load_models(config, sharding.make_mesh(1), sd)
    networks, params, frozen = split_models(sd, module, with_vae=True)
    return methods.make_method(config).make_loss(networks), networks, params, frozen


@pytest.mark.parametrize("method", METHODS)
def test_a_step(models, small, method):
    """What it trains stays in float32, finite, and moves; the UNet that it trains computes in the UNet's dtype.

    The loss of value encoders and of the UNet's methods is that in float32 but for bfloat16's 8 bits.
    """
    config, batch, sd = config_of(method, small[0].root), small[3], models[jnp.bfloat16]
    loss, networks, params, frozen = parts(config, sd)
    tx = make_optimizer(config)
    step = jax.jit(make_train_step(networks, tx, config, loss))
    state, metrics = step(init_state(params, tx), frozen, batch)
    assert all(np.isfinite(x) for x in metrics.values()) and metrics["grad_norm"] > 0
    before, after = jax.tree.leaves(params), jax.tree.leaves(state["params"])
    assert {x.dtype for x in before + after} == {jnp.dtype(jnp.float32)} and all(np.isfinite(x).all() for x in after)
    assert any((a != b).any() for a, b in zip(before, after))
    if method in OF_UNET:
        z, t, c = jnp.ones((2, *sd.latent_shape)), jnp.array([10, 500]), jnp.ones((2, 16, 20))
        predict = jax.jit(lambda params: networks.merge("trained", params).applied(sd.unet)(z, t, c))
        one, two = predict(params), predict(state["params"])
        assert one.dtype == jnp.bfloat16
        assert (one != two).mean() > 0.05, "what a step of 3e-4 changes is not rounded away"
        if method == "dpo_unet":
            # The policy starts at the reference: what is left is how the compiler fuses and rounds each. A margin is
            # the mean over N numbers of 2 e times the difference of two roundings to 8 bits, e about one.
            N = batch.aligned.shape[0] * np.prod(sd.latent_shape)
            deviation = 2 * 2**-9 * np.sqrt(2 / N)
            assert max(abs(metrics["margin_w"]), abs(metrics["margin_l"])) < 3 * deviation
    if method not in ("full", *OF_UNET):  # those of value encoders differ in what these compare
        return
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    loss, _, params, frozen = parts(config, models[jnp.float32])
    noise = draw_noise(key, (8, *sd.latent_shape), config.loss.timesteps)
    assert metrics["loss"] == pytest.approx(float(jax.jit(loss)(params, frozen, batch, noise)[0]), rel=0.03)


@pytest.mark.parametrize("kind", ["low rank", "whole"])
def test_an_update_of_one_step_changes_what_a_layer_of_half_precision_gives(kind):
    """By what it should, in the mean: rounded into the weight, hardly any of it would be left."""
    rng, rate, D = np.random.default_rng(0), 1e-5, 64
    layer = nnx.Linear(D, D, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    x = jnp.array(rng.normal(size=(2000, D)), jnp.bfloat16)
    if kind == "low rank":
        (update,) = low_rank.updates(nnx.Dict(layer=nnx.Dict(to_q=layer)), ("to_q",), 8, nnx.Rngs(1)).values()
        update.lora_B.kernel[...] = jnp.array(rate * rng.choice([-1, 1], (8, D)), jnp.float32)
        change, after = update.lora_A.kernel[...] @ update.lora_B.kernel[...], low_rank.Updated(layer, update, 1.0)
    else:
        change = jnp.array(rate * rng.choice([-1, 1], (D, D)), jnp.float32)
        after = concept_ablation.Rounded(nnx.Param(layer.kernel[...].astype(jnp.float32) + change))
    found = after(x).astype(jnp.float32) - layer(x).astype(jnp.float32)
    expected = x.astype(jnp.float32) @ change

    def share(found):
        return float((found * expected).sum() / (expected**2).sum())

    assert share(found) == pytest.approx(1, abs=0.2)
    rounded = (layer.kernel[...].astype(jnp.float32) + change).astype(jnp.bfloat16)
    assert share((x @ rounded).astype(jnp.float32) - layer(x).astype(jnp.float32)) < 0.5
