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
from livo_jax.methods.base import check_cross_attention, quantised_problems
from livo_jax.methods.of_unet import UNetMethod
from livo_jax.models.weights import name_of, replaced, split
from livo_jax.training import losses
from livo_jax.training.batch import Batch
from livo_jax.training.objective import add_noise, prompt_states

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
        check_cross_attention(config, sd)
        leaves = jax.tree_util.tree_leaves_with_path(split(sd.unet)[1])
        kernels = {name_of(layer): x for (*layer, _), x in leaves}
        self.kernels = nnx.Dict({k: nnx.Param(x.astype("float32")) for k, x in kernels.items() if k.endswith(TARGETS)})

    def applied(self, unet):
        """The UNet with these in the place of its own."""
        return replaced(unet, lambda layer, kernel: Rounded(kernel), self.kernels)


class ConceptAblation(UNetMethod):
    """The value_prompt_ids of its batches are of the concept, the prompt_ids of the anchor."""

    SECTION = "concept_ablation"
    KINDS = ("harm",)
    Update = Update
    CONCEPTS = True

    @property
    def passes(self):  # the concept's prompt and the anchor's
        return 1, 2, 2 if self.config.concept_ablation.prior else 1, 2

    def problems(self):
        found = quantised_problems(self.config)
        if self.config.data.cache:
            found.append(
                "config.data.cache=True: the anchor prompts of concept_ablation are in no cache, set it to False"
            )
        return found

    def make_loss(self, networks):
        def loss(params, frozen, batch, noise):
            unet = networks.merge("trained", params).applied(networks.merge("unet", frozen["unet"]))
            z_t, t, target = add_noise(networks, frozen, batch, noise, ("aligned",))

            def predict(ids):
                c, text_embeds = prompt_states(networks, frozen, Batch(batch.value_prompt_ids, prompt_ids=ids))
                return unet(z_t, t, c, None, text_embeds, networks.time_ids)

            anchor, concept = predict(batch.prompt_ids), predict(batch.value_prompt_ids)
            ablation = losses.denoising_error(concept, jax.lax.stop_gradient(anchor)).mean()
            kept = losses.denoising_error(anchor, target).mean()
            return ablation + self.config.concept_ablation.prior * kept, {"ablation": ablation, "kept": kept}

        return loss
