"""The losses of config.loss.form: pure functions of per-sample errors, in the paper's symbols.

All take [B] errors: l_w, l_l under the policy (value token and prompt) of the aligned and the violating image, r_w, r_l
under the reference (prompt only), which no gradient passes. All return the scalar loss, and as metrics margin_w =
mean(l_w - r_w) and margin_l = mean(r_l - l_l), both falling as training succeeds, and what else is said. sft takes
l_w alone, and has no metrics.
"""

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
        alpha, beta: slopes, positive scalars or [B]. gamma_1, gamma_2: margins, scalars or [B].

    Returns:
        Also active_w and active_l, the share of rows whose hinge still pulls: of a row without hinges, whose constants
        are 0, none does.
    """
    margin_w, margin_l, metrics = _margins(l_w, l_l, r_w, r_l)
    hinge_w, hinge_l = jax.nn.relu(gamma_1 + beta * margin_w), jax.nn.relu(gamma_2 + alpha * margin_l)
    active = {"active_w": jnp.mean(hinge_w > 0), "active_l": jnp.mean(hinge_l > 0)}
    return jnp.mean(hinge_w + hinge_l), metrics | active


def sft(l_w):
    """Supervised fine-tuning: mean(l_w), the diffusion loss. It asks for no violating image, and for no reference."""
    return jnp.mean(l_w), {}


def dpo(l_w, l_l, r_w, r_l, *, beta, T):
    """Diffusion-DPO (Wallace et al. 2024, eq. 14).

        mean( -log sigmoid( -beta T omega (l_w - r_w - (l_l - r_l)) ) )

    Errors that are weighted by timestep bring their omega(lambda_t) with them; the paper takes a constant one. Its
    norms are sums over the latents where ours are means, and its published code writes beta_dpo / 2 for beta T omega:
    5,000 there, for Stable Diffusion 1.5, is beta = 2.5 here, with T = 1,000.

    Args:
        beta: the weight of the divergence from the reference, positive.
        T: the number of timesteps.
    """
    margin_w, margin_l, metrics = _margins(l_w, l_l, r_w, r_l)
    return -jnp.mean(jax.nn.log_sigmoid(-beta * T * (margin_w + margin_l))), metrics


def ipo(l_w, l_l, r_w, r_l, *, beta, T):
    """IPO (Azar et al. 2024, eq. 17) with the log-ratios of Diffusion-DPO.

        mean( (-T omega (l_w - r_w - (l_l - r_l)) - 1 / (2 beta))^2 )

    The margin between aligned and violating images is led to 1 / (2 beta) and no further. Arguments as of dpo.
    """
    margin_w, margin_l, metrics = _margins(l_w, l_l, r_w, r_l)
    return jnp.mean((-T * (margin_w + margin_l) - 1 / (2 * beta)) ** 2), metrics


def kto(l_w, l_l, r_w, r_l, *, beta, T):
    """Diffusion-KTO (Li et al. 2024) with the Kahneman-Tversky utility, the sigmoid.

        mean over all images of 1 - sigmoid( +- beta (-T omega (l - r) - z) ),  + for aligned, - for violating ones

    z, the divergence from the reference, is the mean log-ratio -T omega (l - r) of all images of the batch, 0 where
    that is negative, as the paper estimates it; no gradient passes it. Arguments as of dpo.

    Returns:
        Also kl = z.
    """
    margin_w, margin_l, metrics = _margins(l_w, l_l, r_w, r_l)
    ratio_w, ratio_l = -T * margin_w, T * margin_l
    z = jax.lax.stop_gradient(jax.nn.relu(jnp.mean(ratio_w + ratio_l) / 2))
    utility = jax.nn.sigmoid(beta * (ratio_w - z)) + jax.nn.sigmoid(-beta * (ratio_l - z))
    return 1 - jnp.mean(utility) / 2, metrics | {"kl": z}


def _margins(l_w, l_l, r_w, r_l):
    """What all compare, [B] twice, and its means as metrics."""
    r_w, r_l = jax.lax.stop_gradient((r_w, r_l))
    margin_w, margin_l = l_w - r_w, r_l - l_l
    return margin_w, margin_l, {"margin_w": jnp.mean(margin_w), "margin_l": jnp.mean(margin_l)}
