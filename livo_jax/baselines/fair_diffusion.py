"""Fair Diffusion (Friedrich et al. 2023): each image is led to an attribute drawn at random, by edit guidance."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from livo_jax import values
from livo_jax.baselines import Method, drawer, networks
from livo_jax.values import text_hash

STEPS = 50  # of the sampler for which a warm-up is told


class SemanticGuidance(NamedTuple):
    """SEGA (Brack et al. 2023, equations 3 to 10); a guidance of generate with an edit for each direction.

    scale: s_e. warmup: delta, the steps before it takes effect. threshold: lambda, the share of each channel's places
    that an edit leaves alone. momentum: s_m, and beta: beta_m. An edit's weight is its g_i, below 0 to lead away.
    """

    scale: float
    warmup: int
    threshold: float
    momentum: float
    beta: float

    def start(self, z):
        return jnp.zeros((), jnp.int32), jnp.zeros_like(z)

    def __call__(self, prompt, nothing, concepts, weights, guidance_scale, carried):
        """The guided prediction [B, h, w, C], and the next step and its momentum; `carried`: this step's."""
        step, nu = carried
        psi = self.scale * (jnp.stack(concepts) - nothing)  # [E, B, h, w, C]
        least = jnp.quantile(jnp.abs(psi), self.threshold, axis=(2, 3), keepdims=True)
        gamma = jnp.einsum("be,ebhwc->bhwc", weights, jnp.where(jnp.abs(psi) >= least, psi, 0.0))  # eq. 4, 5, 10
        gamma += self.momentum * nu  # eq. 7
        nu = self.beta * nu + (1 - self.beta) * gamma  # eq. 8
        return nothing + guidance_scale * (prompt - nothing) + jnp.where(step >= self.warmup, gamma, 0.0), (
            step + 1,
            nu,
        )


def directions(value, text: str, seed: int, prompt: str, index: int) -> tuple[tuple[str, float], ...]:
    """The edits of the image (seed, prompt, index): towards an attribute drawn at random, away from the others.

    `text` has the {attribute}, and may have the {prompt}. Of two attributes that is the paper's pair; of more, what
    leads away is shared among the others.
    """
    rng = np.random.default_rng(text_hash(f"{seed}, {value.statement}, {prompt}, {index}"))
    K = len(value.attributes)
    chosen = rng.integers(K)
    texts = [text.format(attribute=attribute, prompt=prompt) for attribute in value.attributes]
    return tuple((edit, 1.0 if k == chosen else -1.0 / (K - 1)) for k, edit in enumerate(texts))


def make(config, sd, mesh, *_) -> Method:
    """config.fair_diffusion has `edit`, the text of an attribute, and SemanticGuidance's fields."""
    c = config.fair_diffusion.to_dict()
    text = c.pop("edit")
    guidance = SemanticGuidance(**c)
    guidance = guidance._replace(warmup=round(guidance.warmup * config.sampling.steps / STEPS))
    biases = {value.statement: value for value in values.load(config.principles) if value.kind == "bias"}

    def fair(r):
        edits = (directions(biases[dose.value], text, config.eval.seed, r.prompt, r.index) for dose in r.values)
        return r._replace(edits=sum(edits, ()), values=())

    def draw(requests):
        """Values have numbers of edits of their own, and so a program each."""
        rows, images = [fair(request) for request in requests], {}
        for n in {len(row.edits) for row in rows}:
            part = [i for i, row in enumerate(rows) if len(row.edits) == n]
            images |= zip(part, drawer(config, mesh)(sd, [rows[i] for i in part], guidance=guidance))
        return np.stack([images[i] for i in range(len(rows))])

    settings = {"method": "fair_diffusion", "edit": text, "guidance": guidance._asdict()}
    return Method(draw, networks(sd), settings, kinds=("bias",))
