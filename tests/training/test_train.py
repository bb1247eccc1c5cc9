"""The numbers of a step are PyTorch's, and its losses their papers'."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from ml_collections import ConfigDict

from livo_jax import diffusion
from livo_jax.models.weights import to_published
from livo_jax.training.batch import Batch, draw_noise
from livo_jax.training.objective import add_noise, make_loss
from livo_jax.training.step import init_state, make_train_step, over_hinged
from tests.conftest import QUICK, compiled_with

LOSS = dict(alpha=50.0, beta=100.0, gamma_1=1.0, gamma_2=0.5)
CONFIG = ConfigDict(
    {
        "seed": 7,
        "loss": LOSS | {"form": "livo", "timesteps": (0, 1000), "min_snr_gamma": 0.0},
        "train": {"accumulate": 1, "ema_decay": 0.0, "train_embeddings": True},
    }
)
SCALE = 0.18215
# The slope of a hinge (beta = 100) times the rounding of errors of about one, 1e-7 for each of some operations.
ROUNDING = LOSS["beta"] * 5e-7


def torch_step(torch_models, value_encoder, batch, config, scheduler_config, step=0):
    """The published algorithm, plainly, on the noise that our step draws: loss, and per-sample errors.

    Leaves its gradients in value_encoder.
    """
    from diffusers import DDPMScheduler

    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), step), 4)

    def channels_first(x):
        return torch.tensor(np.moveaxis(np.asarray(x), -1, 1))

    n, shape = len(batch.aligned), (len(batch.aligned), 8, 8, 4)
    noise_w, noise_l, eps = (channels_first(jax.random.normal(key, shape)) for key in keys[:3])
    t = torch.tensor(np.asarray(jax.random.randint(keys[3], (n,), 0, 1000)))

    scheduler = DDPMScheduler.from_config(scheduler_config)
    unet, vae, text_encoder = (torch_models[name] for name in ("unet", "vae", "text_encoder"))
    with torch.no_grad():
        c = text_encoder(torch.tensor(batch.prompt_ids)).last_hidden_state
        if batch.beside is not None:  # of all rows
            c = torch.cat([value_encoder(torch.tensor(batch.beside_prompt_ids)).pooler_output[:, None], c], dim=1)
    u = value_encoder(torch.tensor(batch.value_prompt_ids)).pooler_output
    policy = torch.cat([u[:, None], c], dim=1)
    snr = scheduler.alphas_cumprod[t] / (1 - scheduler.alphas_cumprod[t])
    gamma = config.loss.min_snr_gamma
    velocity = scheduler.config.prediction_type == "v_prediction"
    weight = torch.clamp(snr, max=gamma) / (snr + velocity) if gamma else torch.ones(n)
    errors = {}
    for side, noise in (("aligned", noise_w), ("violating", noise_l)):
        with torch.no_grad():
            posterior = vae.encode(channels_first(getattr(batch, side))).latent_dist
            z = SCALE * (posterior.mean + posterior.std * noise)
            z_t = scheduler.add_noise(z, eps, t)
            target = scheduler.get_velocity(z, eps, t) if velocity else eps
            errors["r", side] = weight * ((unet(z_t, t, c).sample - target) ** 2).mean((1, 2, 3))
        errors["l", side] = weight * ((unet(z_t, t, policy).sample - target) ** 2).mean((1, 2, 3))
    hinge_w = torch.relu(LOSS["gamma_1"] + LOSS["beta"] * (errors["l", "aligned"] - errors["r", "aligned"]))
    hinge_l = torch.relu(LOSS["gamma_2"] + LOSS["alpha"] * (errors["r", "violating"] - errors["l", "violating"]))
    loss = (hinge_w + hinge_l).mean()
    loss.backward()
    return loss.item(), {k: v.detach().numpy() for k, v in errors.items()}


def named(value_encoder, what) -> dict[str, np.ndarray]:
    """what(parameter) of a PyTorch text model, by our names."""
    return {n.removeprefix("text_model."): what(p).detach().numpy() for n, p in value_encoder.named_parameters()}


LEARNING_RATE, STEPS = 1e-4, 3


def torch_training(torch_models, batch, scheduler_config) -> dict:
    """Losses, gradient norms, the first gradients and the parameters of some steps of the paper's AdamW in PyTorch."""
    value_encoder = copy.deepcopy(torch_models["text_encoder"])
    optimizer = torch.optim.AdamW(value_encoder.parameters(), LEARNING_RATE, weight_decay=1e-2)
    losses, norms, gradients = [], [], None
    for step in range(STEPS):
        optimizer.zero_grad()
        losses.append(torch_step(torch_models, value_encoder, batch, CONFIG, scheduler_config, step)[0])
        gradients = gradients or named(value_encoder, lambda p: p.grad.clone())
        norms.append(torch.nn.utils.clip_grad_norm_(value_encoder.parameters(), 1.0).item())
        optimizer.step()
    return dict(losses=losses, norms=norms, gradients=gradients, params=named(value_encoder, lambda p: p))


def compare_training(expected: dict, networks, frozen, batch):
    """Our steps equal torch_training's."""
    tx = optax.chain(
        optax.trace(0.0), optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE, weight_decay=1e-2)
    )  # the first part's state is the gradient
    step = jax.jit(make_train_step(networks, tx, CONFIG, make_loss(networks, CONFIG)), donate_argnums=0)
    state = init_state(jax.tree.map(jnp.copy, frozen["text_encoder"]), tx)
    for k in range(STEPS):
        state, metrics = step(state, frozen, batch)
        assert metrics["loss"] == pytest.approx(expected["losses"][k], rel=1e-3)
        assert metrics["grad_norm"] == pytest.approx(expected["norms"][k], rel=1e-2)
        if k == 0:
            ours, gradients = to_published(state["opt_state"][0].trace), expected["gradients"]
            assert ours.keys() == gradients.keys()
            for name, gradient in gradients.items():
                # The keys' bias has a gradient of mathematically zero: compare to the size of all gradients.
                error = np.abs(ours[name] - gradient).max() / max(np.abs(gradient).max(), 1e-3 * expected["norms"][0])
                assert error < 2e-3, (name, error)
    ours, theirs, start = to_published(state["params"]), expected["params"], to_published(frozen["text_encoder"])
    for name in theirs:
        # AdamW moves by about the learning rate whatever the size of a gradient. Where it is rounding, so
        # is its sign: the keys' bias, and few others.
        difference = np.abs(ours[name] - theirs[name])
        assert difference.max() <= 2.1 * STEPS * LEARNING_RATE, name
        if not name.endswith("k_proj.bias"):
            moved = np.abs(theirs[name] - start[name]).mean()
            assert difference.mean() < 0.02 * max(moved, 1e-8), (name, difference.mean(), moved)


def beside(sd, batch, rows) -> Batch:
    """The batch with another value beside each pair's own, in the rows that are told."""
    ids = sd.tokenize([f"colour equality: green, a bloody {word}" for word in "abcdefgh"])
    return batch._replace(beside_prompt_ids=ids, beside=np.broadcast_to(rows, 8))


def louder(text_encoder, params: dict, times: float = 10.0):
    """Copies of a PyTorch text encoder and our parameters, of larger outputs: a margin that is no rounding."""
    text_encoder = copy.deepcopy(text_encoder)
    with torch.no_grad():
        next(p for n, p in text_encoder.named_parameters() if n.endswith("final_layer_norm.weight")).mul_(times)
    norm = params["final_layer_norm"]
    return text_encoder, params | {"final_layer_norm": norm | {"scale": norm["scale"] * times}}


@pytest.mark.parametrize(
    "min_snr_gamma, second_value, prediction",
    [(2.0, True, "epsilon"), (2.0, False, "v_prediction")],  # with neither: the steps below
)
def test_loss_and_gradients_are_pytorchs(parts, torch_models, min_snr_gamma, second_value, prediction):
    sd, networks, frozen, batch = parts
    batch = beside(sd, batch, True) if second_value else batch
    scheduler_config = sd.scheduler_config | {"prediction_type": prediction}
    networks = networks._replace(schedule=diffusion.NoiseSchedule.from_json(scheduler_config))
    config = CONFIG.copy_and_resolve_references()
    config.loss.min_snr_gamma = min_snr_gamma
    tx = optax.trace(0.0)  # its state is the gradient
    step = jax.jit(make_train_step(networks, tx, config, make_loss(networks, config)))
    value_encoder, params = louder(torch_models["text_encoder"], frozen["text_encoder"])
    state, metrics = step(init_state(params, tx), frozen, batch)
    loss, errors = torch_step(torch_models, value_encoder, batch, config, scheduler_config)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
    margin_w = errors["l", "aligned"] - errors["r", "aligned"]
    assert metrics["margin_w"] == pytest.approx(margin_w.mean(), rel=1e-3)
    ours, theirs = to_published(state["opt_state"].trace), named(value_encoder, lambda p: p.grad)
    total = np.sqrt(sum((g**2).sum() for g in theirs.values()))
    for name, gradient in theirs.items():
        error = np.abs(ours[name] - gradient).max() / max(np.abs(gradient).max(), 1e-3 * total)
        assert error < 1e-3, (name, error)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# Of log-ratios of the policy to the reference, -T (l - r), as the papers write the losses; beta = 0.01.
FORMS = {
    "dpo": lambda w, v: -np.log(sigmoid(0.01 * (w - v))).mean(),
    "ipo": lambda w, v: ((w - v - 1 / 0.02) ** 2).mean(),
    "kto": lambda w, v: 1 - np.mean([sigmoid(0.01 * (w - kl(w, v))), sigmoid(-0.01 * (v - kl(w, v)))]),
}


def kl(w, v):
    return max(0, np.mean([w, v]))


@pytest.mark.parametrize("form", FORMS)
def test_other_losses_are_their_papers(parts, torch_models, form):
    """Steps with them are in tests/training/test_half_precision.py."""
    sd, networks, frozen, batch = parts
    config = CONFIG.copy_and_resolve_references()
    config.loss.update(form=form, beta=0.01)
    value_encoder, params = louder(torch_models["text_encoder"], frozen["text_encoder"])
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    noise = draw_noise(key, (8, *sd.latent_shape), config.loss.timesteps)
    loss, _ = jax.jit(make_loss(networks, config))(params, frozen, batch, noise)
    _, errors = torch_step(torch_models, value_encoder, batch, CONFIG, sd.scheduler_config)
    ratios = [-1000 * (errors["l", side] - errors["r", side]) for side in ("aligned", "violating")]
    assert min(np.abs(ratio).max() for ratio in ratios) > 1, "they tell something"
    assert loss == pytest.approx(FORMS[form](*ratios), rel=1e-3)


def test_fine_tuning_asks_for_no_violating_image(parts, torch_models):
    sd, networks, frozen, batch = parts
    config = CONFIG.copy_and_resolve_references()
    config.loss.form = "sft"
    step = jax.jit(make_train_step(networks, optax.sgd(0.0), config, make_loss(networks, config)))
    state = init_state(frozen["text_encoder"], optax.sgd(0.0))
    _, metrics = step(state, frozen, batch._replace(violating=None))
    _, errors = torch_step(
        torch_models, copy.deepcopy(torch_models["text_encoder"]), batch, CONFIG, sd.scheduler_config
    )
    assert metrics["loss"] == pytest.approx(errors["l", "aligned"].mean(), rel=1e-4)


def test_an_anchor_asks_for_the_prediction_to_stay(small):
    """In the place of its hinges: its row of the loss is a slope times how far the token moves the prediction.

    Of a harm that of the aligned image alone, times anchor_of_harms.
    """
    sd, networks, frozen, batch = small
    config, params = CONFIG.copy_and_resolve_references(), frozen["text_encoder"]
    noise = draw_noise(jax.random.key(0), (8, *sd.latent_shape), (0, 1000))
    plain, _ = jax.jit(make_loss(networks, config))(params, frozen, batch, noise)
    config.loss.update(anchor=300.0, anchor_of_harms=0.25)
    loss_of = jax.jit(make_loss(networks, config))
    some, harm = np.arange(8) % 3 == 0, np.arange(8) % 2 == 0
    loss, live = {}, {}
    for name, rows in {"none": some & False, "some": some, "others": ~some, "all": some | True}.items():
        loss[name], metrics = loss_of(params, frozen, batch._replace(anchor=rows, harm=harm), noise)
        live[name] = over_hinged(metrics)["active_w"]
    assert loss["none"] == pytest.approx(float(plain), abs=ROUNDING)
    assert loss["some"] + loss["others"] == pytest.approx(float(loss["none"] + loss["all"]), rel=1e-5), (
        "each row on its own"
    )
    assert metrics["active_w"] == metrics["active_l"] == metrics["hinged"] == live["all"] == 0, "no hinge is left"
    assert live["some"] * 5 + live["others"] * 3 == pytest.approx(live["none"] * 8) and live["none"] > 0, (
        "shares are of the rows that have hinges"
    )

    @jax.jit
    def moved():
        text_encoder, unet = (networks.merge(name, frozen[name]) for name in ("text_encoder", "unet"))
        z_t, t, _ = add_noise(networks, frozen, batch, noise)
        c = jnp.repeat(text_encoder(batch.prompt_ids).last_hidden_state, 2, axis=0)
        u = jnp.repeat(text_encoder(batch.value_prompt_ids).pooled[:, None], 2, axis=0)
        moved = (unet(z_t, t, jnp.concatenate([u, c], axis=1)) - unet(z_t, t, c)) ** 2
        aligned, violating = jnp.mean(moved.reshape(8, 2, -1), axis=2).T
        return jnp.mean(jnp.where(harm, 0.25 * aligned, (aligned + violating) / 2))

    assert loss["all"] == pytest.approx(300.0 * float(moved()), rel=1e-4) and loss["all"] > 0.01


def test_an_anchor_is_the_same_to_every_loss(small):
    """In the place of what the form asks for, of which only a number without a gradient is left."""
    sd, networks, frozen, batch = small
    noise = draw_noise(jax.random.key(0), (8, *sd.latent_shape), (0, 1000))
    some, harm = np.arange(8) % 3 == 0, np.full(8, True)
    found = {}
    for form in ("livo", "sft", "dpo"):
        config = CONFIG.copy_and_resolve_references()
        config.loss.update({"form": form, "beta": 0.01, "anchor": 300.0})
        value_and_grad = jax.jit(jax.value_and_grad(make_loss(networks, config), has_aux=True))
        for rows in (some | True,) if form == "livo" else (some, ~some, some | True, some & False):
            given = batch._replace(anchor=rows, harm=harm)
            (loss, metrics), gradient = value_and_grad(frozen["text_encoder"], frozen, given, noise)
            found[form, rows.sum()] = float(loss), gradient
            assert metrics.keys() >= {"anchor_moved"} and (form == "livo" or "hinged" not in metrics)
    livo, of_livo = found["livo", 8]
    scale = float(optax.tree.norm(of_livo))
    for form in ("sft", "dpo"):
        (first, _), (second, _), (none, of_none), (alone, of_form) = (found[form, n] for n in (3, 5, 0, 8))
        for a, b in zip(jax.tree.leaves(of_livo), jax.tree.leaves(of_form), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4 * scale)
        if form == "dpo":
            assert alone - livo == pytest.approx(np.log(2), rel=1e-4), "no margin"
        assert first + second == pytest.approx(none + alone, rel=1e-5), "each row on its own"
        assert float(optax.tree.norm(optax.tree.add_scale(of_none, -1.0, of_form))) > 0.1 * scale


def test_three_steps_are_pytorchs(parts, torch_models):
    """Optimised, as users compile them: other tests compile quickly."""
    sd, networks, frozen, batch = parts
    expected = torch_training(torch_models, batch, sd.scheduler_config)
    emitters = {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters" in QUICK else {}
    with compiled_with(xla_backend_optimization_level=3, **emitters):
        compare_training(expected, networks, frozen, batch)


def test_a_second_value_that_is_not_there_changes_nothing(small):
    """Row by row, whatever its text."""
    sd, networks, frozen, batch = small
    tx = optax.trace(0.0)
    step = jax.jit(make_train_step(networks, tx, CONFIG, make_loss(networks, CONFIG)))
    batches = {"none": batch, "hidden": beside(sd, batch, False), "half": beside(sd, batch, np.arange(8) % 2 == 0)}
    results = {name: step(init_state(frozen["text_encoder"], tx), frozen, rows) for name, rows in batches.items()}
    losses, norms = ({n: float(results[n][1][name]) for n in results} for name in ("loss", "grad_norm"))
    for a, b in zip(*(jax.tree.leaves(results[name][0]["opt_state"].trace) for name in ("none", "hidden"))):
        np.testing.assert_allclose(a, b, atol=1e-5 * norms["none"])
    assert losses["hidden"] == pytest.approx(losses["none"], rel=1e-5)
    assert losses["half"] != pytest.approx(losses["none"], rel=1e-5)
