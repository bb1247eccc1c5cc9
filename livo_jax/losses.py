"""Preference losses as pure functions of per-sample errors, in the paper's symbols."""

import jax
import jax.numpy as jnp


def denoising_error(prediction, target):
    """Mean squared error of each sample: [B, h, w, C] twice -> [B] float32."""
    difference = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.mean(difference**2, axis=tuple(range(1, difference.ndim)))


def livo(l_w, l_l, r_w, r_l, *, alpha, beta, gamma_1, gamma_2):
    """The LiVO loss (Wang et al. 2024, section 4.2): two hinges on how far the policy left the reference.

        mean( relu(gamma_1 + beta (l_w - r_w)) + relu(gamma_2 + alpha (r_l - l_l)) )

    The first asks that the value token lowers the error of aligned images until beta (r_w - l_w)
    reaches gamma_1, the second that it raises the error of violating images until alpha (l_l - r_l)
    reaches gamma_2.

    Args:
        l_w, l_l: [B] errors under the policy (value token and prompt) of the aligned and the violating image.
        r_w, r_l: [B] errors under the reference (prompt only); no gradient passes them.
        alpha, beta: slopes, positive scalars or [B]. gamma_1, gamma_2: margins, scalars or [B].

    Returns:
        The scalar loss, and metrics: margin_w = mean(l_w - r_w) and margin_l = mean(r_l - l_l), both
        falling as training succeeds; active_w and active_l, the share of hinges that still pull.
    """
    r_w, r_l = jax.lax.stop_gradient((r_w, r_l))
    margin_w, margin_l = l_w - r_w, r_l - l_l
    hinge_w, hinge_l = jax.nn.relu(gamma_1 + beta * margin_w), jax.nn.relu(gamma_2 + alpha * margin_l)
    metrics = {
        "margin_w": jnp.mean(margin_w),
        "margin_l": jnp.mean(margin_l),
        "active_w": jnp.mean(hinge_w > 0),
        "active_l": jnp.mean(hinge_l > 0),
    }
    return jnp.mean(hinge_w + hinge_l), metrics
