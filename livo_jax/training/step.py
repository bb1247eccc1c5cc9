"""The training step: pure functions that need jax, flax and optax alone."""

import functools

import jax
import jax.numpy as jnp
import optax

from livo_jax import seeds, sharding
from livo_jax.training.batch import Batch, draw_noise
from livo_jax.training.objective import Networks, moments


def init_state(params: dict, tx: optax.GradientTransformation, ema_decay: float = 0.0) -> dict:
    """The state of step 0. `params` are the value encoder's, float32; with a decay, so is their average `ema`."""
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "opt_state": tx.init(params)}
    return state | ({"ema": jax.tree.map(jnp.copy, params)} if ema_decay else {})


def trained_params(state: dict) -> dict:
    """The value encoder's parameters to use: their moving average where there is one."""
    return state.get("ema", state["params"])


def norms(state: dict) -> dict:
    """params_norm, opt_state_norm, perhaps ema_norm, float32 scalars: finite where all numbers of that part are.

    A number whose square is not finite counts with those: nothing trains on from there either. No part of a step, for
    all of the state is read for them.
    """
    return {f"{name}_norm": optax.tree.norm(part) for name, part in state.items() if name != "step"}


def over_hinged(metrics: dict) -> dict:
    """The metrics with active_w and active_l as shares of the rows that have hinges: `hinged`, where not all have.

    To be taken of the mean over micro-batches, which differ in how many rows have.
    """
    metrics = dict(metrics)
    if "hinged" in metrics:
        hinged = jnp.maximum(metrics.pop("hinged"), 1e-9)  # where no row has, both are 0
        metrics |= {name: metrics[name] / hinged for name in ("active_w", "active_l")}
    return metrics


def make_train_step(networks: Networks, tx, config, loss):
    """The function train_step(state, frozen, batch) -> (state, metrics), to be jitted.

    Args:
        config: its `loss.timesteps` and `loss.timestep_density`, `seed` and `train` (accumulate, ema_decay) are used.
        loss: loss(params, frozen, batch, noise) -> (loss, metrics), as objective.make_loss makes it.

    The step takes `state` (step, params, opt_state, perhaps ema), `frozen` (parameters of text_encoder,
    unet and, for images, vae) and a Batch. Its metrics are float32 scalars: loss, those of the form's function in
    losses.py (active_w and active_l are of the rows that have hinges), and grad_norm.
    """
    accumulate, ema_decay = config.train.accumulate, config.train.ema_decay

    def train_step(state, frozen, batch: Batch):
        # One base key, folded with the step. All is drawn for the whole batch, so that no number depends on how it is
        # accumulated.
        shape = jax.eval_shape(lambda: moments(networks, frozen, batch, "aligned"))[0].shape  # [B, h, w, C]
        key = jax.random.fold_in(seeds.key(config.seed), state["step"])
        noise = draw_noise(key, shape, config.loss.timesteps, config.loss.get("timestep_density", "uniform"))

        def gradient(rows):
            return jax.value_and_grad(loss, has_aux=True)(state["params"], frozen, *rows)

        if accumulate == 1:
            (value, metrics), grads = gradient((batch, noise))
        else:  # micro-batches of every accumulate-th row: each device's rows stay its own
            parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), (batch, noise))
            zeros = optax.tree.zeros_like(jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts)))
            total, _ = jax.lax.scan(lambda total, rows: (optax.tree.add(total, gradient(rows)), None), zeros, parts)
            (value, metrics), grads = optax.tree.scale(1 / accumulate, total)

        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        after = {"step": state["step"] + 1, "params": params, "opt_state": opt_state}
        if ema_decay:  # which follows closely at first
            decay = jnp.minimum(ema_decay, after["step"] / (after["step"] + 9))
            after["ema"] = optax.incremental_update(params, state["ema"], 1 - decay)
        return after, {"loss": value, **over_hinged(metrics), "grad_norm": optax.tree.norm(grads)}

    return train_step


def state_shapes(mesh, params: dict, tx, config, rules=sharding.RULES) -> dict:
    """Of init_state: jax.ShapeDtypeStruct, each leaf where the partition rules have it. `params` may be shapes too."""
    shapes = jax.eval_shape(functools.partial(init_state, tx=tx, ema_decay=config.train.ema_decay), params)
    return jax.tree.map(
        lambda leaf, lies: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lies),
        shapes, sharding.by_rules(shapes, mesh, rules),
    )  # fmt: skip


def state_on(mesh, params: dict, tx, config, rules=sharding.RULES) -> dict:
    """init_state, each leaf where the partition rules have it."""
    lies = jax.tree.map(lambda leaf: leaf.sharding, state_shapes(mesh, params, tx, config, rules))
    return jax.jit(functools.partial(init_state, tx=tx, ema_decay=config.train.ema_decay), out_shardings=lies)(params)


def jit_step(train_step, state: dict, frozen: dict, mesh):
    """train_step under jit: state and frozen stay where they lie, the state given is used up, rows go to the mesh."""

    def on_mesh(*given):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # which the attention kernels ask for
            return train_step(*given)

    lies, kept = jax.tree.map(lambda x: x.sharding, (state, frozen))
    given, returned = (lies, kept, sharding.over_batch(mesh)), (lies, sharding.replicated(mesh))
    return jax.jit(on_mesh, in_shardings=given, out_shardings=returned, donate_argnums=0)
