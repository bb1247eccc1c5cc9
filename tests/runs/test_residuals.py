"""What the backward pass needs is counted as a compiler keeps it that makes elementwise results again."""

import jax
import jax.numpy as jnp
import pytest

from livo_jax.runs.residuals import kept_for_backward

x, w, v = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((512, 64), (64, 128), (128, 32)))
HIDDEN, OUT, SUMS = 2 * 512 * 128, 2 * 512 * 32, 4 * 512  # bytes; of the float32 sums of rows


def normalise(h):
    h = h.astype(jnp.float32)
    h = h - h.mean(-1, keepdims=True)
    return (h * jax.lax.rsqrt((h**2).mean(-1, keepdims=True) + 1e-5)).astype(jnp.bfloat16)


@jax.jit
def jitted(h):
    return jax.nn.silu(normalise(h))


@pytest.mark.parametrize("between, sums", [(jax.nn.silu, 0), (normalise, 2), (jitted, 2)])
def test_between_products_their_results_and_sums_are_kept(between, sums):
    """Twelve bytes of float32 for each two of a product, where results are counted as they are asked for."""

    def loss(w, x, v):
        return ((between(x @ w) @ v).astype(jnp.float32) ** 2).sum(), {}

    assert kept_for_backward(loss, w, x, v) == HIDDEN + OUT + sums * SUMS


def test_what_is_made_again_is_not_kept():
    def block(w, x):
        return jax.nn.silu(x @ w)

    def loss(w, x, v):
        return (jax.checkpoint(block)(w, x) @ v).astype(jnp.float32).sum(), {}

    assert kept_for_backward(loss, w, x, v) == 0  # x and w are given, v is what a sum's gradient goes through


def test_where_making_again_takes_more_the_result_is_kept():
    """A sum of two products is one number where its terms are two."""

    def loss(w, x, v):
        h = x @ w + jnp.tanh(x) @ w
        return (jax.nn.silu(h) @ v).astype(jnp.float32).sum(), {}

    assert kept_for_backward(loss, w, x, v) == HIDDEN
