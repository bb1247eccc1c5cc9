"""The LiVO step: its numbers are PyTorch's, it trains the value encoder only, on any mesh."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from ml_collections import ConfigDict

from livo_jax import sharding, train
from livo_jax.models.weights import split, to_published
from tests.conftest import relative_error

LOSS = dict(alpha=50.0, beta=100.0, gamma_1=1.0, gamma_2=0.5)
CONFIG = ConfigDict({"seed": 7, "loss": LOSS | {"timesteps": (0, 1000), "min_snr_gamma": 0.0}})
SCALE = 0.18215


@pytest.fixture(scope="module")
def parts(sd):
    graphs, params = {}, {}
    for name in ("text_encoder", "unet", "vae"):
        graphs[name], params[name] = split(getattr(sd, name))
    graphs["value_encoder"] = graphs["text_encoder"]
    return graphs, params


@pytest.fixture(scope="module")
def batch(sd):
    rng = np.random.default_rng(0)
    prompts = [f"a photo of a {word}" for word in "baker cook smith tailor farmer miller sailor diver".split()]
    return {
        "prompt_ids": sd.tokenize(prompts),
        "value_prompt_ids": sd.tokenize(["shape equality, " + prompt for prompt in prompts]),
        "aligned": rng.uniform(-1, 1, (8, 64, 64, 3)).astype(np.float32),
        "violating": rng.uniform(-1, 1, (8, 64, 64, 3)).astype(np.float32),
    }


def torch_step(torch_models, batch, config):
    """The published algorithm, plainly, on the noise that our step draws: loss, gradients, per-sample errors."""
    from diffusers import DDPMScheduler

    from data_tools.shapeworld import SCHEDULER

    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0), 4)
    channels_first = lambda x: torch.tensor(np.moveaxis(np.asarray(x), -1, 1))
    n, shape = len(batch["aligned"]), (len(batch["aligned"]), 8, 8, 4)
    noise_w, noise_l, eps = (channels_first(jax.random.normal(key, shape)) for key in keys[:3])
    t = torch.tensor(np.asarray(jax.random.randint(keys[3], (n,), 0, 1000)))

    scheduler = DDPMScheduler.from_config(SCHEDULER)
    unet, vae, text_encoder = (torch_models[name] for name in ("unet", "vae", "text_encoder"))
    value_encoder = copy.deepcopy(text_encoder)
    with torch.no_grad():
        c = text_encoder(torch.tensor(batch["prompt_ids"])).last_hidden_state
    u = value_encoder(torch.tensor(batch["value_prompt_ids"])).pooler_output
    policy = torch.cat([u[:, None], c], dim=1)
    snr = scheduler.alphas_cumprod[t] / (1 - scheduler.alphas_cumprod[t])
    gamma = config.loss.min_snr_gamma
    weight = torch.minimum(snr, torch.tensor(gamma)) / snr if gamma else torch.ones(n)
    errors = {}
    for side, noise in (("aligned", noise_w), ("violating", noise_l)):
        with torch.no_grad():
            posterior = vae.encode(channels_first(batch[side])).latent_dist
            z_t = scheduler.add_noise(SCALE * (posterior.mean + posterior.std * noise), eps, t)
            errors["r", side] = weight * ((unet(z_t, t, c).sample - eps) ** 2).mean((1, 2, 3))
        errors["l", side] = weight * ((unet(z_t, t, policy).sample - eps) ** 2).mean((1, 2, 3))
    hinge_w = torch.relu(LOSS["gamma_1"] + LOSS["beta"] * (errors["l", "aligned"] - errors["r", "aligned"]))
    hinge_l = torch.relu(LOSS["gamma_2"] + LOSS["alpha"] * (errors["r", "violating"] - errors["l", "violating"]))
    loss = (hinge_w + hinge_l).mean()
    loss.backward()
    gradients = {n.removeprefix("text_model."): p.grad.numpy() for n, p in value_encoder.named_parameters()}
    return loss.item(), gradients, {k: v.detach().numpy() for k, v in errors.items()}


@pytest.mark.parametrize("min_snr_gamma", [0.0, 2.0])
def test_loss_and_gradients_are_pytorchs(parts, torch_models, batch, sd, min_snr_gamma):
    graphs, frozen = parts
    config = CONFIG.copy_and_resolve_references()
    config.loss.min_snr_gamma = min_snr_gamma
    tx = optax.trace(0.0)  # its state is the gradient
    step = jax.jit(train.make_train_step(graphs, sd.schedule, tx, config, SCALE))
    state, metrics = step(train.init_state(frozen["text_encoder"], tx), frozen, batch)
    loss, gradients, errors = torch_step(torch_models, batch, config)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
    margin_w = errors["l", "aligned"] - errors["r", "aligned"]
    assert metrics["margin_w"] == pytest.approx(margin_w.mean(), rel=1e-3)
    ours = to_published(state["opt_state"].trace)
    assert ours.keys() == gradients.keys()
    total = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    assert metrics["grad_norm"] == pytest.approx(total, rel=1e-3)
    for name, gradient in gradients.items():
        # The keys' bias has a gradient of mathematically zero: compare to the size of all gradients.
        error = np.abs(ours[name] - gradient).max() / max(np.abs(gradient).max(), 1e-3 * total)
        assert error < 1e-3, (name, error)


def run(parts, batch, sd, devices: int, steps: int = 3):
    """Losses and the final state of some steps of AdamW on a mesh."""
    graphs, frozen = parts
    mesh = sharding.make_mesh(devices)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    step = jax.jit(
        train.make_train_step(graphs, sd.schedule, tx, CONFIG, SCALE),
        in_shardings=(sharding.replicated(mesh), sharding.replicated(mesh), sharding.over_batch(mesh)),
        out_shardings=sharding.replicated(mesh),
        donate_argnums=0,
    )
    # copied, for the step may overwrite its state
    state = jax.device_put(
        train.init_state(jax.tree.map(jnp.copy, frozen["text_encoder"]), tx), sharding.replicated(mesh)
    )
    frozen = jax.device_put(frozen, sharding.replicated(mesh))
    before = jax.tree.map(np.array, frozen)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, frozen, sharding.global_batch(mesh, batch))
        losses.append(float(metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, before, frozen)  # nothing frozen has moved
    return losses, state


def test_same_losses_on_one_and_on_eight_devices(parts, batch, sd):
    losses_1, state_1 = run(parts, batch, sd, 1)
    losses_8, state_8 = run(parts, batch, sd, 8)
    assert losses_1 == pytest.approx(losses_8, rel=1e-5)
    assert losses_1[0] != losses_1[-1] and int(state_8["step"]) == 3
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state_1["params"], parts[1]["text_encoder"])
    assert all(0 < x < 0.01 for x in jax.tree.leaves(moved)), "every parameter of the value encoder trains"


def test_a_policy_without_value_token_has_no_margin(parts, batch, sd):
    """l = r where the policy's first token is masked away: the step compares nothing but the token."""
    graphs, frozen = parts
    text_encoder, unet = (nnx.merge(graphs[n], frozen[n]) for n in ("text_encoder", "unet"))
    z, t = np.random.default_rng(0).normal(size=(8, 8, 8, 4)).astype(np.float32), np.arange(8) * 100
    out = text_encoder(batch["prompt_ids"])
    policy = jnp.concatenate([out.pooled[:, None], out.last_hidden_state], axis=1)
    masked = unet(z, t, policy, jnp.ones(policy.shape[:2], bool).at[:, 0].set(False))
    assert relative_error(masked, unet(z, t, out.last_hidden_state)) < 1e-5
    assert relative_error(unet(z, t, policy), unet(z, t, out.last_hidden_state)) > 1e-3


def test_batches_and_meshes_that_do_not_fit():
    mesh = sharding.make_mesh(8)
    with pytest.raises(ValueError, match="config.train.batch_size=12 is not a multiple of the mesh's 8.*8 or 16"):
        sharding.check_batch_size(mesh, 12, "config.train.batch_size")
    with pytest.raises(ValueError, match="data=9: there are 8 devices"):
        sharding.make_mesh(9)


def test_learning_rates():
    """Warm-up rises from zero to the rate, none starts at it, cosine ends at zero; other schedules are refused."""

    def rates(schedule, warmup_steps):
        train_config = dict(schedule=schedule, warmup_steps=warmup_steps, steps=10, learning_rate=0.1, grad_clip=1.0)
        tx = train.make_optimizer(ConfigDict({"train": train_config | dict(b1=0.0, b2=0.0, eps=0.0, weight_decay=0.0)}))
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
    with pytest.raises(ValueError, match="'linear': choose from constant, cosine"):
        rates("linear", 0)
    with pytest.raises(ValueError, match="warmup_steps=10: choose 0 to config.train.steps - 1 = 9"):
        rates("cosine", 10)
