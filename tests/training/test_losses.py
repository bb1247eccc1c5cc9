import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from livo_jax.training import losses

CONSTANTS = dict(alpha=500.0, beta=1000.0, gamma_1=1.0, gamma_2=0.5)


def numpy_livo(l_w, l_l, r_w, r_l):
    def hinge(x):
        return np.maximum(x, 0)

    return np.mean(hinge(1.0 + 1000 * (l_w - r_w)) + hinge(0.5 + 500 * (r_l - l_l)))


def test_value_against_numpy():
    errors = np.random.default_rng(0).uniform(0, 0.01, (4, 16)).astype(np.float32)
    loss, metrics = losses.livo(*errors, **CONSTANTS)
    assert np.isclose(loss, numpy_livo(*errors), rtol=1e-5)
    assert np.isclose(metrics["margin_w"], (errors[0] - errors[2]).mean(), atol=1e-7)
    assert np.isclose(metrics["margin_l"], (errors[3] - errors[1]).mean(), atol=1e-7)
    assert metrics["active_w"] == np.mean(1.0 + 1000 * (errors[0] - errors[2]) > 0)
    assert metrics["active_l"] == np.mean(0.5 + 500 * (errors[3] - errors[1]) > 0)


def test_hinges_pull_the_right_way_and_let_go():
    """An aligned error is pushed down, a violating one up, until the margins are reached; no reference moves."""
    grad = jax.grad(lambda e: losses.livo(*e, **CONSTANTS)[0])
    base = jnp.full((4, 1), 0.1)
    d_l_w, d_l_l, d_r_w, d_r_l = grad(base)[:, 0]
    assert d_l_w == CONSTANTS["beta"] and d_l_l == -CONSTANTS["alpha"] and d_r_w == d_r_l == 0
    # gamma_1 / beta = gamma_2 / alpha = 0.001: beyond it nothing pulls
    reached = base.at[0].add(-0.0011).at[1].add(0.0011)
    assert losses.livo(*reached, **CONSTANTS)[0] == 0 and not grad(reached).any()
    one_short = base.at[0].add(-0.0009).at[1].add(0.0011)
    assert grad(one_short)[0] > 0 and grad(one_short)[1] == 0


BETA, T = 2.5, 1000  # of Stable Diffusion 1.5 in the paper of Diffusion-DPO, whose code has beta_dpo = 5000
RATIOS = {name: functools.partial(getattr(losses, name), beta=BETA, T=T) for name in ("dpo", "ipo", "kto")}
REFERENCE = jnp.full((4, 8), 0.1)  # a policy that is the reference


def torch_diffusion_dpo(l_w, l_l, r_w, r_l, beta_dpo=5000):
    """As the authors' training script has it."""
    inside = -0.5 * beta_dpo * ((l_w - l_l) - (r_w - r_l))
    return -torch.nn.functional.logsigmoid(inside).mean()


def torch_ipo(l_w, l_l, r_w, r_l):
    """Azar et al. 2024, eq. 17, with log pi / pi_ref as the difference of errors."""
    log_pi_w, log_pi_l, log_ref_w, log_ref_l = (-T * x for x in (l_w, l_l, r_w, r_l))
    h = log_pi_w - log_pi_l - (log_ref_w - log_ref_l)
    return ((h - 1 / (2 * BETA)) ** 2).mean()


def torch_diffusion_kto(l_w, l_l, r_w, r_l):
    """As the authors' training script has it, on images in any order with a label each."""
    model_losses, ref_loss = torch.cat([l_w, l_l]), torch.cat([r_w, r_l])
    label = torch.cat([torch.ones_like(l_w), -torch.ones_like(l_l)])
    g = ref_loss - model_losses
    g = g - g.mean().clamp(min=0).detach()
    return (1 - torch.sigmoid(label * BETA * T * g)).mean()


@pytest.mark.parametrize("drift", [-2e-4, 2e-4])  # of all errors: with and without a divergence that kto subtracts
@pytest.mark.parametrize(
    "name, theirs", [("dpo", torch_diffusion_dpo), ("ipo", torch_ipo), ("kto", torch_diffusion_kto)]
)
def test_value_and_gradients_are_the_published_ones(name, theirs, drift):
    rng = np.random.default_rng(0)
    reference = rng.uniform(0.05, 0.2, (2, 16))
    errors = np.concatenate([reference + drift + rng.normal(0, 1e-3, (2, 16)), reference]).astype(np.float32)
    given = torch.tensor(errors, dtype=torch.float64, requires_grad=True)
    expected = theirs(*given)
    expected.backward()
    loss, metrics = RATIOS[name](*errors)
    gradient = jax.grad(lambda e: RATIOS[name](*e)[0])(jnp.array(errors))
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    expected = given.grad[:2].numpy()
    np.testing.assert_allclose(gradient[:2], expected, rtol=2e-3, atol=1e-4 * np.abs(expected).max())
    assert not gradient[2:].any(), "no gradient passes the reference"
    assert metrics["margin_w"] == pytest.approx((errors[0] - errors[2]).mean(), abs=1e-6)
    assert metrics["margin_l"] == pytest.approx((errors[3] - errors[1]).mean(), abs=1e-6)


def test_dpo_at_the_reference():
    """log 2, and pulls at aligned and violating errors alike with beta T / 2 of a pair."""
    loss, gradient = jax.value_and_grad(lambda e: losses.dpo(*e, beta=BETA, T=T)[0])(REFERENCE)
    assert loss == pytest.approx(np.log(2))
    np.testing.assert_allclose(gradient[:2], np.outer([1, -1], np.full(8, BETA * T / 2 / 8)), rtol=1e-6)


def test_ipo_has_its_minimum_at_a_margin_of_half_1_over_beta():
    def loss(h):
        return losses.ipo(*REFERENCE.at[0].add(-h / T / 2).at[1].add(h / T / 2), beta=BETA, T=T)[0]

    at = 1 / (2 * BETA)
    assert loss(at) == pytest.approx(0, abs=1e-6) and jax.grad(loss)(at) == pytest.approx(0, abs=1e-3)
    assert jax.grad(loss)(0.9 * at) < 0 < jax.grad(loss)(1.1 * at), "it goes no further, where dpo does"
    assert loss(0.0) == pytest.approx(at**2, rel=1e-5)


def test_kto_rises_with_each_image_of_the_wrong_kind_and_bounds_what_one_can_do():
    gradient = jax.grad(lambda e: RATIOS["kto"](*e)[0])
    rng = np.random.default_rng(1)
    errors = REFERENCE + jnp.array(rng.normal(0, 1e-3, (4, 8)))
    assert (gradient(errors)[0] > 0).all() and (gradient(errors)[1] < 0).all()
    assert RATIOS["kto"](*REFERENCE)[0] == pytest.approx(0.5)
    far = REFERENCE.at[0, 0].add(1.0)  # an outlier: dpo pulls at it with all its weight, the utility is flat there
    assert gradient(far)[0, 0] < 1e-6 < gradient(far)[0, 1]
    assert jax.grad(lambda e: RATIOS["dpo"](*e)[0])(far)[0, 0] == pytest.approx(BETA * T / 8)


def test_sft_is_the_diffusion_loss_of_aligned_images():
    l_w = jnp.array([0.1, 0.3])
    loss, metrics = losses.sft(l_w)
    assert loss == pytest.approx(0.2) and not metrics
    assert jax.grad(lambda error: losses.sft(error)[0])(l_w).tolist() == [0.5, 0.5]


def test_error_is_float32_mean_per_sample():
    a = jnp.full((2, 3, 4, 5), 1.0, jnp.bfloat16).at[1].set(3.0)
    error = losses.denoising_error(a, jnp.zeros_like(a))
    assert error.dtype == jnp.float32 and error.tolist() == [1.0, 9.0]
