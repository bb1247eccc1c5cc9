"""Fair Diffusion (Friedrich et al. 2023): each image is led to an attribute, by edit guidance.

The paper draws the attribute at random. Here they are dealt out evenly, as LiVO's tokens are: what chance adds
to D1 would hide what the methods do.
"""

import dataclasses
import hashlib

import jax.numpy as jnp
import numpy as np

from livo_jax import values
from livo_jax.methods.base import Drawing, Method, by_group, drawer, guidance_problems, weights_of
from livo_jax.sampling.guidance import EditGuidance


class SemanticGuidance(EditGuidance):
    """SEGA (Brack et al. 2023, equations 3 to 10), with an edit for each direction.

    scale: s_e. threshold: lambda, the share of each channel's places that an edit leaves alone. An edit's weight is
    its g_i, below 0 to lead away.
    """

    def __call__(self, prompt, negative, concepts, weights, guidance_scale, carried):
        """The guided prediction [B, h, w, C], and what the next step carries."""
        psi = self.scale * (jnp.stack(concepts) - negative)  # [E, B, h, w, C]
        least = jnp.quantile(jnp.abs(psi), self.threshold, axis=(2, 3), keepdims=True)
        gamma = jnp.einsum("be,ebhwc->bhwc", weights, jnp.where(jnp.abs(psi) >= least, psi, 0.0))  # eq. 4, 5, 10
        gamma, carried = self.carry(gamma, carried)  # eq. 7, 8
        return negative + guidance_scale * (prompt - negative) + gamma, carried


def directions(value, text: str, seed: int, prompt: str, index: int) -> tuple[tuple[str, float], ...]:
    """The edits of the image (seed, prompt, index): towards one attribute, away from the others.

    Of every K consecutive images of a prompt, from 0 on, each attribute has one, in a random order.

    `text` has the {attribute}, and may have the {prompt}. Of two attributes that is the paper's pair; of more, what
    leads away is shared among the others.
    """
    K = len(value.attributes)
    text_of_block = f"{seed}, {value.statement}, {prompt}, {index // K}"
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(text_of_block.encode()).digest()))
    chosen = rng.permutation(K)[index % K]
    texts = [text.format(attribute=attribute, prompt=prompt) for attribute in value.attributes]
    return tuple((edit, 1.0 if k == chosen else -1.0 / (K - 1)) for k, edit in enumerate(texts))


class FairDiffusion(Method):
    """config.fair_diffusion has `edit`, the text of an attribute, and SemanticGuidance's fields."""

    SECTION = "fair_diffusion"
    KINDS, EVEN = ("bias",), True

    def problems(self):
        return guidance_problems(self.config)

    def make_drawing(self, models, mesh, workdir, judge):
        config, c = self.config, self.config.fair_diffusion.to_dict()
        text = c.pop("edit")
        guidance = SemanticGuidance(**c).of_steps(config.sampling.steps)
        biases = {value.statement: value for value in values.load_principles(config) if value.kind == "bias"}

        def lead(r):
            edits = (directions(biases[dose.value], text, config.eval.seed, r.prompt, r.index) for dose in r.values)
            return r._replace(edits=sum(edits, ()), values=())

        def draw_alike(number_of_edits, requests):
            return drawer(config, mesh)(models.sd, requests, guidance=guidance)

        def draw(requests):  # values have numbers of edits of their own, and so a program each
            return by_group([lead(request) for request in requests], lambda r: len(r.edits), draw_alike)

        settings = {
            "method": "fair_diffusion", "edit": text, "dealt": "evenly", "guidance": dataclasses.asdict(guidance),
        }  # fmt: skip
        return Drawing(draw, weights_of(models.sd), settings)
