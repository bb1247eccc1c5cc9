"""Concept Ablation (Kumari et al. 2023), the model-based variant: a harm's prompts are drawn as those without it.

The keys and values of the UNet's cross-attention are trained so that its prediction under the concept prompt ("a bloody
baker") becomes that under the anchor prompt ("a baker"), which no gradient passes, while that stays what it is:

    mean |sg(eps_hat(z_t, anchor, t)) - eps_hat(z_t, concept, t)|^2 + prior mean |target - eps_hat(z_t, anchor, t)|^2

z_t are of the pairs' aligned images. Without the second term a long training ends where all prompts are one; the
published one adds it for some concepts and stops early for others. It is for harms alone: a bias is no concept to be
removed. Its pairs' prompts are anchors all the same.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from livo_jax import sharding
from livo_jax.models import low_rank
from livo_jax.models.weights import split
from livo_jax.training import losses
from livo_jax.training.step import noised, prompt_states

KINDS = ("harm",)
TARGETS = ("attn2.to_k", "attn2.to_v")


class Rounded(nnx.Module):
    """A linear layer of a float32 kernel, whose products alone are rounded, to the dtype of what it reads.

    A kernel rounded to half precision would not move in a training step.
    """

    def __init__(self, kernel: nnx.Param):
        self.kernel = kernel

    def __call__(self, x):
        # Of full precision: what accelerators take by default would round the kernel all the same.
        y = jnp.matmul(x.astype(jnp.float32), self.kernel[...], precision="highest")
        return y.astype(x.dtype)


class Update(nnx.Module):
    """The kernels of the cross-attention's keys and values, to be trained, in float32."""

    RULES = sharding.WHOLE

    def __init__(self, config, sd, rngs):
        leaves = jax.tree_util.tree_leaves_with_path(split(sd.unet)[1])
        kernels = {low_rank.name_of(layer): x for (*layer, _), x in leaves}
        self.kernels = nnx.Dict({k: nnx.Param(x.astype("float32")) for k, x in kernels.items() if k.endswith(TARGETS)})

    def applied(self, unet):
        """The UNet with these in the place of its own."""
        return low_rank.replaced(unet, lambda layer, kernel: Rounded(kernel), self.kernels)


def make_loss(graphs: dict, schedule, config, scaling_factor: float, time_ids=None):
    """The loss of a batch whose value_prompt_ids are of the concept and prompt_ids of the anchor; as step.make_loss."""

    def loss(params, frozen, batch):
        unet = nnx.merge(graphs["update"], params).applied(nnx.merge(graphs["unet"], frozen["unet"]))
        z_t, t, target = noised(graphs, schedule, scaling_factor, frozen, batch, ("aligned",))

        def predict(batch):
            c, text_embeds = prompt_states(graphs, frozen, batch)
            return unet(z_t, t, c, None, text_embeds, time_ids)

        anchor, concept = predict(batch), predict({"prompt_ids": batch["value_prompt_ids"]})
        ablation = losses.denoising_error(concept, jax.lax.stop_gradient(anchor)).mean()
        kept = losses.denoising_error(anchor, target).mean()
        return ablation + config.concept_ablation.prior * kept, {"ablation": ablation, "kept": kept}

    return loss
