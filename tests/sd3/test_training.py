"""A step of Stable Diffusion 3.5 computes what PyTorch does; methods take it, and runs go from start to end."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from configs.baselines import dpo_unet
from livo_jax import StableDiffusion, methods, sharding, value_encoders
from livo_jax.models.weights import split, to_published
from livo_jax.runs import restore
from livo_jax.training import objective
from livo_jax.training.batch import Batch, draw_noise
from livo_jax.training.objective import split_models
from livo_jax.training.step import init_state, make_train_step
from tests.kinds import OTHER, PROMPTS, VALUE, at_once, of_kind, that_moves_pooled
from tests.sdxl.conftest import Towers
from tests.training.test_train import CONFIG, LOSS

FORMS = ("livo", "sft", "dpo", "ipo", "kto")
BETA, T = 0.01, 1000  # of the forms that multiply by T: with LiVO's the rounding of errors would show


@pytest.fixture(scope="module")
def batch(sd):
    rng = np.random.default_rng(0)
    images = {side: rng.uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32) for side in ("aligned", "violating")}
    return Batch(sd.tokenize([f"{VALUE}, {p}" for p in PROMPTS]), prompt_ids=sd.tokenize(PROMPTS), **images)


def channels_first(x):
    return torch.tensor(np.moveaxis(np.asarray(x), -1, 1))


def encode(theirs, ids):
    """The text's states and pooled text, as section 2 of the paper joins them."""
    ids = torch.tensor(ids)
    one, two = (
        theirs[name](ids[:, k, :16], output_hidden_states=True)
        for k, name in enumerate(("text_encoder", "text_encoder_2"))
    )
    clips = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
    clips = torch.cat([clips, torch.zeros(*clips.shape[:2], 4)], dim=-1)
    t5 = theirs["text_encoder_3"](ids[:, 2, :24]).last_hidden_state
    return torch.cat([clips, t5], dim=1), torch.cat([one.text_embeds, two.text_embeds], dim=-1)


def flow_errors(theirs, trained, batch, noise, sigmas):
    """Errors of the velocity {("l" or "r", side): [B]}, plainly; those of the policy have gradients."""
    transformer, vae = theirs["transformer"], theirs["vae"]
    sigma = torch.tensor(sigmas[np.asarray(noise.t)], dtype=torch.float32)
    eps, errors = channels_first(noise.eps), {}
    with torch.no_grad():
        c, pooled = encode(theirs, batch.prompt_ids)
    u = trained(torch.tensor(batch.value_prompt_ids)[:, :2, :16]).pooler_output
    policy = torch.cat([torch.nn.functional.pad(u, (0, 4))[:, None], c], dim=1)
    for side in ("aligned", "violating"):
        with torch.no_grad():
            posterior = vae.encode(channels_first(getattr(batch, side))).latent_dist
            z = 1.5 * (posterior.mean + posterior.std * channels_first(getattr(noise, side)) - 0.06)
            z_t = (1 - sigma[:, None, None, None]) * z + sigma[:, None, None, None] * eps
        for name, cond in (("l", policy), ("r", c)):
            with torch.set_grad_enabled(name == "l"):
                v = transformer(z_t, cond, pooled, 1000 * sigma).sample
            errors[name, side] = ((v - (eps - z)) ** 2).mean((1, 2, 3))
    return errors


def loss_of(form, errors):
    """The papers' losses of errors."""
    of_w, of_l = (errors["l", side] - errors["r", side] for side in ("aligned", "violating"))
    if form == "sft":
        return errors["l", "aligned"].mean()
    if form == "livo":
        hinges = LOSS["gamma_1"] + LOSS["beta"] * of_w, LOSS["gamma_2"] - LOSS["alpha"] * of_l
        return sum(map(torch.relu, hinges)).mean()
    if form == "dpo":
        return -torch.nn.functional.logsigmoid(-BETA * T * (of_w - of_l)).mean()
    if form == "ipo":
        return ((-T * (of_w - of_l) - 1 / (2 * BETA)) ** 2).mean()
    z = torch.relu((-T * (of_w + of_l)).mean() / 2)
    return 1 - (torch.sigmoid(BETA * (-T * of_w - z)) + torch.sigmoid(-BETA * (-T * of_l - z))).mean() / 2


def config_of(form):
    config = copy.deepcopy(CONFIG)
    config.loss.form, config.loss.timestep_density = form, "logit_normal"
    if form != "livo":
        config.loss.beta = BETA
    return config


def test_losses_and_gradients_are_pytorchs(sd, config, theirs, batch, monkeypatch):
    """A step of LiVO and its gradients; and every form, of errors that a cache gives, with a second value beside."""
    value_encoder = value_encoders.start(of_kind(config, "full"), sd, sharding.make_mesh())
    networks, params, frozen = split_models(sd, value_encoder, with_vae=True)
    livo, key = config_of("livo"), jax.random.fold_in(jax.random.key(CONFIG.seed), 0)
    noise = draw_noise(key, (2, *sd.latent_shape), (0, 1000), "logit_normal")
    trained = copy.deepcopy(Towers(theirs["text_encoder"], theirs["text_encoder_2"]))
    errors = flow_errors(theirs, trained, batch, noise, sd.schedule.sigmas)

    tx = optax.trace(0.0)  # its state is the gradient
    step = jax.jit(make_train_step(networks, tx, livo, objective.make_loss(networks, livo)))
    state, metrics = step(init_state(params, tx), frozen, batch)
    expected = loss_of("livo", errors)
    expected.backward()
    largest = max(error.max().item() for error in errors.values())
    rounding = CONFIG.loss.beta * 1e-6 * largest  # the steeper slope times that of an error in float32
    assert float(metrics["loss"]) == pytest.approx(expected.item(), abs=rounding)
    gradients = to_published(state["opt_state"].trace)
    named = {name.replace(".text_model.", "."): p.grad for name, p in trained.named_parameters()}
    named = {name: gradient for name, gradient in named.items() if "text_projection" not in name}
    assert gradients.keys() == named.keys()
    total = np.sqrt(sum(float((gradient**2).sum()) for gradient in named.values()))
    for name, gradient in named.items():
        error = np.abs(gradients[name] - gradient.numpy()).max() / max(gradient.abs().max().item(), 1e-3 * total)
        assert error < 1e-3, (name, error)

    preferences = {form: objective.make_preference(config_of(form), T) for form in FORMS}
    monkeypatch.setattr(objective, "make_preference", lambda *_: lambda *of_images: (0.0, of_images))
    loss = objective.make_loss(networks, livo)

    @jax.jit
    def errors_of(params, frozen, batch, beside):
        text = networks.merge("text_encoder", frozen["text_encoder"])(batch.prompt_ids)
        vae = networks.merge("vae", frozen["vae"])
        aligned, violating = (jnp.concatenate(vae.encode(x), -1) for x in (batch.aligned, batch.violating))
        cached = Batch(
            batch.value_prompt_ids, prompt_states=text.last_hidden_state, text_embeds=text.text_embeds,
            aligned_moments=aligned, violating_moments=violating, beside_prompt_ids=batch.beside_prompt_ids,
            beside=beside,
        )  # fmt: skip
        assert text.last_hidden_state.shape[1:] == sd.family.states_shape == (40, 48)
        assert text.text_embeds.shape[1] == sd.family.pooled_width == 16
        return loss(params, frozen, cached, noise)[1]

    batch = batch._replace(beside_prompt_ids=sd.tokenize([OTHER] * 2))
    alone, beside = (errors_of(params, frozen, batch, np.array([False, there])) for there in (False, True))
    for form, preference in preferences.items():
        found = preference(*alone[: 1 if form == "sft" else 4])[0]
        assert float(found) == pytest.approx(loss_of(form, errors).item(), rel=1e-3), form
    first, second = np.abs(np.array(alone) - np.array(beside)).max(0)
    assert first < 1e-5 < 1e-4 < second, "a second value beside the second pair alone"


def test_a_value_that_moves_the_pooled_text(sd, config, made, batch):
    """The policy reads it, and the reference what a second value beside it moves; that one trains nothing here."""
    value_encoder = that_moves_pooled(made["full"], of_kind(config, "full"))
    batch = batch._replace(beside_prompt_ids=sd.tokenize([OTHER] * 2), beside=np.array([False, True]))
    c, pooled = jnp.zeros((2, *sd.family.states_shape)), jnp.ones((2, sd.family.pooled_width))
    graph, params = split(value_encoder)

    @jax.jit
    def read(params, batch=batch):
        (*_, policy), (*_, reference) = objective.condition(nnx.merge(graph, params), sd.text_encoder, batch, c, pooled)
        return policy, reference

    policy, reference = read(params)
    both = batch.value_prompt_ids, batch.beside_prompt_ids
    own, beside = (at_once(value_encoder.pooled_shift, ids, sd.text_encoder) for ids in both)
    np.testing.assert_allclose(reference, pooled + beside * batch.beside[:, None], atol=1e-5)
    np.testing.assert_allclose(policy, reference + own, atol=1e-5)
    for alone, with_second in zip(read(params, batch._replace(beside=None)), (own, 0 * own)):
        np.testing.assert_allclose(alone, pooled + with_second, atol=1e-5)
    of_reference = jax.grad(lambda params: read(params)[1].sum())(params)
    assert not any(map(np.any, jax.tree.leaves(of_reference)))


@pytest.mark.parametrize("trained", ["lora", "token", "dpo_unet"])
def test_what_else_is_trained_takes_a_step(sd, config, made, batch, trained):
    """By abstract evaluation: its state keeps its shapes."""
    config = config.copy_and_resolve_references()
    config.update(CONFIG)
    if trained == "dpo_unet":
        config = dpo_unet.get_config("tiny")
    method = methods.make_method(config)
    module = made.get(trained) or method.start(sd, sharding.make_mesh())
    networks, params, frozen = split_models(sd, module, with_vae=True)
    tx = optax.adamw(1e-3)
    state = init_state(params, tx)
    step = make_train_step(networks, tx, config, method.make_loss(networks))
    after, metrics = jax.eval_shape(step, state, frozen, batch)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert metrics["loss"].shape == ()


def test_divided_over_devices_it_is_the_same(sd, config, made, batch):
    """Weights over two axes, gathered where a block computes, rows over two."""
    config = config.copy_and_resolve_references()
    config.shard_frozen = True
    mesh = sharding.make_mesh(2, 2, 2)
    divided = StableDiffusion.from_pretrained(sd.root, sharding=functools.partial(sharding.by_rules, mesh=mesh))
    kernel = divided.unet.transformer_blocks[0].attn.add_q_proj.kernel
    assert kernel.sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor")
    two = jax.tree.map(lambda x: np.concatenate([x, x]), batch)
    noise = draw_noise(jax.random.key(0), (4, *sd.latent_shape), (0, 1000))
    gentle = copy.deepcopy(CONFIG)
    gentle.loss.update(alpha=1.0, beta=2.0)  # steeper slopes would multiply the rounding

    def loss_of_model(sd, on=None):
        if on:
            restore.compute_on(on, config, sd, made["lora"])
        networks, params, frozen = split_models(sd, made["lora"], with_vae=True)
        loss = jax.jit(objective.make_loss(networks, gentle))
        with jax.set_mesh(on or sharding.make_mesh()):
            return float(loss(params, frozen, two, noise)[0])

    assert loss_of_model(divided, mesh) == pytest.approx(loss_of_model(sd), rel=1e-5)
