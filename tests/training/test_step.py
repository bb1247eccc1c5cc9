"""The LiVO step trains the value encoder only, the same on any mesh, and tells what is not finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict

from livo_jax import sharding
from livo_jax.models.unet import UNet2DConditionModel
from livo_jax.models.vae import AutoencoderKL
from livo_jax.models.weights import split
from livo_jax.training.batch import Batch
from livo_jax.training.objective import Networks, make_loss
from livo_jax.training.optimizer import but_embeddings, make_optimizer
from livo_jax.training.step import init_state, jit_step, make_train_step, norms, state_on, trained_params
from tests.conftest import relative_error
from tests.training.test_train import CONFIG, ROUNDING, SCALE


def run(small, *mesh: int, steps: int = 1, shard_frozen: bool = False, **train_config):
    """The metrics and the state after each of some steps of AdamW on a mesh."""
    sd, networks, frozen, batch = small
    networks = networks._replace(graphs={**networks.graphs})
    mesh = sharding.make_mesh(*mesh)
    config = CONFIG.copy_and_resolve_references()
    config.train.update(train_config)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    # copied, for the step may overwrite its state
    state = state_on(mesh, jax.tree.map(jnp.copy, frozen["text_encoder"]), tx, config)
    frozen = jax.device_put(frozen, sharding.replicated(mesh))
    gather = functools.partial(sharding.gather, mesh=mesh)
    if mesh.shape["fsdp"] > 1:
        value_encoder = networks.merge("trained", frozen["text_encoder"])
        value_encoder.encoder.gather = gather
        networks.graphs["trained"] = split(value_encoder)[0]
    if shard_frozen:
        sd.unet.gather = gather
        networks.graphs["unet"] = split(sd.unet)[0]
        sd.unet.gather = None
        frozen = {name: jax.device_put(part, sharding.by_rules(part, mesh)) for name, part in frozen.items()}
    step = jit_step(make_train_step(networks, tx, config, make_loss(networks, config)), state, frozen, mesh)
    before, record = jax.tree.map(np.array, frozen), []
    for _ in range(steps):
        state, metrics = step(state, frozen, sharding.global_batch(mesh, batch))
        record.append((jax.tree.map(float, metrics), jax.tree.map(np.array, state)))
    jax.tree.map(np.testing.assert_array_equal, before, frozen)  # nothing frozen has moved
    return record


def losses(record) -> list[float]:
    return [metrics["loss"] for metrics, _ in record]


@pytest.fixture(scope="module")
def on_one_device(small):
    return run(small, 1, steps=10, ema_decay=0.15)


@pytest.mark.parametrize("mesh, settings", [((2, 2, 1), {"accumulate": 2}), ((2, 2, 2), {"shard_frozen": True})])
def test_steps_are_the_same_on_any_mesh(small, on_one_device, mesh, settings):
    """And in micro-batches: the losses and gradients of the whole batch."""
    record = run(small, *mesh, steps=4, **settings)
    assert losses(record) == pytest.approx(losses(on_one_device)[:4], abs=ROUNDING)
    for a, b in zip(*(jax.tree.leaves(of[0][1]["opt_state"][1][0].mu) for of in (record, on_one_device))):
        np.testing.assert_allclose(a, b, atol=1e-6)
    trees = record[-1][1]["params"], on_one_device[3][1]["params"], small[2]["text_encoder"]
    leaves = zip(*(jax.tree_util.tree_leaves_with_path(tree) for tree in trees))
    for (path, ours), (_, theirs), (_, first) in leaves:
        # Where a gradient is rounding, AdamW makes its sign a step of the learning rate: the keys' bias.
        if path[-2].key != "k_proj" or path[-1].key != "bias":
            assert np.abs(ours - theirs).mean() < 1e-2 * np.abs(theirs - first).mean(), path


def test_every_parameter_trains(small, on_one_device):
    (*_, (_, state)) = on_one_device
    assert losses(on_one_device)[0] != losses(on_one_device)[-1] and int(state["step"]) == 10
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state["params"], small[2]["text_encoder"])
    assert all(0 < x < 0.02 for x in jax.tree.leaves(moved))


def test_moving_average(small, on_one_device):
    """Its decay rises as t / (t + 9), to ema_decay."""
    history = [small[2]["text_encoder"], *(state["params"] for _, state in on_one_device[:2])]
    _, state = on_one_device[1]
    first = jax.tree.map(lambda a, b: 0.1 * a + 0.9 * b, *history[:2])  # 1 / 10 is below 0.15
    expected = jax.tree.map(lambda a, b: 0.15 * a + 0.85 * b, first, history[2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state["ema"], expected)
    assert trained_params(state) is state["ema"]


def test_rematerialisation_changes_memory_alone(sd):
    """The gradient of what the UNet reads stays; what it keeps for the backward pass shrinks."""
    gradients, kept = {}, {}
    rng = np.random.default_rng(0)
    z, cond = (jnp.array(rng.normal(size=(2, *shape)), jnp.float32) for shape in (sd.latent_shape, (17, 20)))

    def backward(graph, params, cond):
        return jax.vjp(lambda cond: nnx.merge(graph, params)(z, jnp.array([100, 800]), cond), cond)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(graph, params, cond):
        predicted, pull = backward(graph, params, cond)
        return pull(predicted)

    for name in ("none", "dots", "full"):
        unet = nnx.merge(*split(sd.unet))
        unet.remat = name
        graph, params = split(unet)
        gradients[name] = gradient(graph, params, cond)
        _, pull = jax.eval_shape(functools.partial(backward, graph, params), cond)
        kept[name] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pull))
        keys = [x.shape for x in jax.tree.leaves(pull) if x.shape[-1:] == cond.shape[1:2]]
        assert not keys, "probabilities of attention are never kept"
    assert np.abs(gradients["none"]).max() > 1e-3
    for name in ("dots", "full"):
        np.testing.assert_allclose(gradients["none"], gradients[name], rtol=1e-3, atol=1e-5)
    assert max(kept["dots"], kept["full"]) < 0.7 * kept["none"]


def test_models_that_stay_are_traced_once(small, monkeypatch):
    """However many steps are made of them, as where methods are compared."""
    _, networks, frozen, batch = small
    config, tx = CONFIG.copy_and_resolve_references(), optax.trace(0.0)

    def trace(form):
        config.loss.form = form
        step = make_train_step(networks, tx, config, make_loss(networks, config))
        jax.jit(step).trace(init_state(frozen["text_encoder"], tx), frozen, batch)

    trace("livo")
    for model, method in (UNet2DConditionModel, "__call__"), (AutoencoderKL, "encode"):
        monkeypatch.setattr(model, method, None)
    trace("dpo")


MASKED = dict(
    train_embeddings=False, schedule="constant", warmup_steps=0, steps=10, learning_rate=0.1, grad_clip=1.0, b1=0.9,
    b2=0.9, eps=1e-8, weight_decay=0.1, batch_size=8, reference_batch_size=8, learning_rate_scaling="none",
)  # fmt: skip


def test_frozen_embeddings(small, on_one_device):
    """Without train_embeddings all but them move, and neither optimizer nor gradient norm knows them."""
    sd, networks, frozen, batch = small
    config = CONFIG.copy_and_resolve_references()
    config.train.update(MASKED)
    tx = make_optimizer(config)
    state = init_state(frozen["text_encoder"], tx)
    sizes = {x.shape for x in jax.tree.leaves(state["opt_state"])}
    assert sizes.isdisjoint({x.shape for x in jax.tree.leaves(frozen["text_encoder"]["embeddings"])})
    after, metrics = jax.jit(make_train_step(networks, tx, config, make_loss(networks, config)))(state, frozen, batch)
    moved = jax.tree.map(lambda a, b: bool((a != b).all()), after["params"], state["params"])
    embeddings = moved.pop("embeddings")
    for layer in moved["encoder"]["layers"].values():
        del layer["self_attn"]["k_proj"]["bias"]  # it shifts a query's scores alike: its gradient is rounding, or zero
    assert not any(jax.tree.leaves(embeddings)) and all(jax.tree.leaves(moved))
    assert metrics["loss"] == pytest.approx(on_one_device[0][0]["loss"], abs=ROUNDING)
    assert metrics["grad_norm"] < on_one_device[0][0]["grad_norm"]


def step_of(loss, **train_config):
    """The step of a loss(params) alone: what it makes of a small state, and its metrics."""
    config = CONFIG.copy_and_resolve_references()
    config.train.update(MASKED | train_config)
    params = {"embeddings": jnp.array([0.1, -0.2]), "encoder": jnp.array([0.3, 0.4, 0.5])}
    tx = make_optimizer(config)
    state = init_state(params, tx, config.train.ema_decay)
    networks, batch = Networks({}, None, SCALE), Batch(None, aligned_moments=np.zeros((1, 2, 2, 8), np.float32))
    step = make_train_step(networks, tx, config, lambda params, frozen, batch, noise: (loss(params), {}))
    after, metrics = jax.jit(step)(state, {}, batch)
    return state, after, metrics | norms(after)


def total(params):
    return sum(jnp.sum(x) for x in jax.tree.leaves(params))


def test_the_mask_stops_updates_by_itself():
    """Whatever gradient a loss gives to what is not trained. A checkpoint of optax.masked alone fits its state."""
    for factor in (1e3, np.nan):
        state, after, _ = step_of(lambda params, factor=factor: total(params) + factor * total(params["embeddings"]))
        np.testing.assert_array_equal(after["params"]["embeddings"], state["params"]["embeddings"])
        moved = state["params"]["encoder"] * (1 - 0.1 * 0.1) - 0.1  # AdamW's first step: the sign, and the decay
        np.testing.assert_allclose(after["params"]["encoder"], moved, rtol=1e-6)
        first = (1 - 0.9) / np.sqrt(3)  # of the gradient that is clipped, without what is not trained
        np.testing.assert_allclose(after["opt_state"][1].inner_state[0].mu["encoder"], first, rtol=1e-6)
    before = optax.chain(
        optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(optax.constant_schedule(0.1)), but_embeddings)
    )
    assert jax.tree.structure(before.init(state["params"])) == jax.tree.structure(state["opt_state"])


LOSSES = {  # what is not finite: the loss, its gradient, the state after it
    "nothing": (total, set()),
    "loss": (lambda params: total(params) + jnp.inf, {"loss"}),
    "gradient": (lambda params: jnp.sqrt(params["encoder"] - 0.3).sum(), {"grad", "params", "opt_state", "ema"}),
    "too large a gradient": (lambda params: 1e30 * total(params), {"grad"}),
    "parameters": (total, {"params", "ema"}),
}


@pytest.mark.parametrize("what", LOSSES)
def test_a_step_tells_what_is_not_finite(what):
    loss, expected = LOSSES[what]
    rate = 1e35 if what == "parameters" else 0.1
    *_, metrics = step_of(loss, ema_decay=0.9, learning_rate=rate, train_embeddings=True)
    assert metrics.keys() == {"loss", "grad_norm", "params_norm", "opt_state_norm", "ema_norm"}
    assert {name.removesuffix("_norm") for name, number in metrics.items() if not np.isfinite(number)} == expected


def test_a_policy_without_value_token_has_no_margin(small):
    """l = r where the policy's first token is masked away: the step compares nothing but the token."""
    _, networks, frozen, batch = small
    text_encoder, unet = (networks.merge(name, frozen[name]) for name in ("text_encoder", "unet"))
    z, t = np.random.default_rng(0).normal(size=(8, 8, 8, 4)).astype(np.float32), np.arange(8) * 100
    out = text_encoder(batch.prompt_ids)
    policy = jnp.concatenate([out.pooled[:, None], out.last_hidden_state], axis=1)
    masked = unet(z, t, policy, jnp.ones(policy.shape[:2], bool).at[:, 0].set(False))
    assert relative_error(masked, unet(z, t, out.last_hidden_state)) < 1e-5
    assert relative_error(unet(z, t, policy), unet(z, t, out.last_hidden_state)) > 1e-3


def test_batches_that_do_not_fit():
    with pytest.raises(ValueError, match="config.train.batch_size=12 is not a multiple of the mesh's 8.*8 or 16"):
        sharding.check_batch_size(sharding.make_mesh(2, 4, 1), 12, "config.train.batch_size")


def test_learning_rates():
    """Warm-up rises from zero to the rate, none starts at it, cosine ends at zero; other schedules are refused."""

    def rates(schedule, warmup_steps, **scaling):
        config = dict(schedule=schedule, warmup_steps=warmup_steps, steps=10, learning_rate=0.1, grad_clip=1.0)
        config |= dict(b1=0.0, b2=0.0, eps=0.0, weight_decay=0.0)
        config |= (
            dict(train_embeddings=True, batch_size=32, reference_batch_size=8, learning_rate_scaling="none") | scaling
        )
        tx = make_optimizer(ConfigDict({"train": config}))
        params, taken = jnp.ones(()), []
        state = tx.init(params)
        for _ in range(10):  # without memory, AdamW moves by the rate itself
            update, state = tx.update(jnp.ones(()), state, params)
            taken.append(-float(update))
        return taken

    assert rates("constant", 0) == pytest.approx([0.1] * 10)
    assert rates("constant", 4) == pytest.approx([0.0, 0.025, 0.05, 0.075] + [0.1] * 6)
    cosine = rates("cosine", 2)
    assert cosine[:3] == pytest.approx([0.0, 0.05, 0.1]) and cosine[2:] == sorted(cosine[2:], reverse=True)
    assert cosine[-1] == pytest.approx(0.1 * (1 + np.cos(np.pi * 7 / 8)) / 2, rel=1e-5)
    assert rates("constant", 0, learning_rate_scaling="linear") == pytest.approx([0.4] * 10)
    assert rates("constant", 0, learning_rate_scaling="sqrt") == pytest.approx([0.2] * 10)
    with pytest.raises(ValueError, match="'cube': choose from none.*\n.*'linear': choose from constant, cosine"):
        rates("linear", 0, learning_rate_scaling="cube")
    with pytest.raises(ValueError, match="warmup_steps=10: choose 0 to config.train.steps - 1 = 9"):
        rates("cosine", 10)
