"""Safe Latent Diffusion (Schramowski et al. 2023): guidance away from a concept, where the prompt leads towards it."""

from typing import NamedTuple

import jax.numpy as jnp

from livo_jax import values
from livo_jax.baselines import Method, concept, drawer, networks

STEPS = 50  # of the sampler for which the paper's warm-ups are


class SafeGuidance(NamedTuple):
    """The paper's equations 3 to 8; a guidance of generate whose edit is the concept.

    scale: s_S. warmup: delta, the steps before it takes effect. threshold: lambda. momentum: s_m, and beta: beta_m.
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
        (concept,), (step, nu) = concepts, carried
        near = prompt - concept
        mu = jnp.where(near < self.threshold, jnp.minimum(1.0, self.scale * jnp.abs(near)), 0.0)  # eq. 5, 6
        gamma = mu * (concept - nothing) + self.momentum * nu  # eq. 4, 7
        nu = self.beta * nu + (1 - self.beta) * gamma  # eq. 8
        direction = prompt - nothing - jnp.where(step >= self.warmup, gamma, 0.0)
        return nothing + guidance_scale * direction, (step + 1, nu)  # eq. 3


PRESETS = {  # table 2, appendix
    "weak": SafeGuidance(20.0, 15, 0.0, 0.0, 0.0),
    "medium": SafeGuidance(1000.0, 10, 0.01, 0.3, 0.4),
    "strong": SafeGuidance(2000.0, 7, 0.025, 0.5, 0.7),
    "max": SafeGuidance(5000.0, 0, 1.0, 0.5, 0.7),
}


def make(config, sd, mesh, *_) -> Method:
    """config.sld.preset is one of PRESETS; its warm-up is for STEPS steps, of fewer it is the same share."""
    if config.sld.preset not in PRESETS:
        raise ValueError(f"config.sld.preset={config.sld.preset!r}: choose from {', '.join(PRESETS)}")
    guidance = PRESETS[config.sld.preset]
    guidance = guidance._replace(warmup=round(guidance.warmup * config.sampling.steps / STEPS))
    texts = {v.statement: concept(v) for v in values.load(config.principles) if v.kind == "harm"}

    def safe(request):
        return request._replace(edits=((", ".join(texts[dose.value] for dose in request.values), 1.0),), values=())

    draw = lambda requests: drawer(config, mesh)(sd, [safe(request) for request in requests], guidance=guidance)
    settings = {"method": "sld", "guidance": guidance._asdict(), "texts": texts}
    return Method(draw, networks(sd), settings, kinds=("harm",))
