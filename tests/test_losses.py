import jax
import jax.numpy as jnp
import numpy as np

from livo_jax import losses

CONSTANTS = dict(alpha=500.0, beta=1000.0, gamma_1=1.0, gamma_2=0.5)


def numpy_livo(l_w, l_l, r_w, r_l):
    hinge = lambda x: np.maximum(x, 0)
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


def test_error_is_float32_mean_per_sample():
    a = jnp.full((2, 3, 4, 5), 1.0, jnp.bfloat16).at[1].set(3.0)
    error = losses.denoising_error(a, jnp.zeros_like(a))
    assert error.dtype == jnp.float32 and error.tolist() == [1.0, 9.0]
