"""Safe Latent Diffusion (Schramowski et al. 2023): guidance away from a concept, where the prompt leads towards it."""

import dataclasses

import jax.numpy as jnp

from livo_jax.methods.base import Drawing, Method, concept_problems, concepts, drawer, guidance_problems, weights_of
from livo_jax.sampling.guidance import EditGuidance


class SafeGuidance(EditGuidance):
    """The paper's equations 3 to 8, whose edit is the concept. scale: s_S. threshold: lambda."""

    def __call__(self, prompt, negative, concepts, weights, guidance_scale, carried):
        """The guided prediction [B, h, w, C], and what the next step carries."""
        (concept,) = concepts
        near = prompt - concept
        mu = jnp.where(near < self.threshold, jnp.minimum(1.0, self.scale * jnp.abs(near)), 0.0)  # eq. 5, 6
        gamma, carried = self.carry(mu * (concept - negative), carried)  # eq. 4, 7, 8
        return negative + guidance_scale * (prompt - negative - gamma), carried  # eq. 3


PRESETS = {  # table 2, appendix
    "weak": SafeGuidance(20.0, 15, 0.0, 0.0, 0.0),
    "medium": SafeGuidance(1000.0, 10, 0.01, 0.3, 0.4),
    "strong": SafeGuidance(2000.0, 7, 0.025, 0.5, 0.7),
    "max": SafeGuidance(5000.0, 0, 1.0, 0.5, 0.7),
}


class SafeLatentDiffusion(Method):
    """config.sld.preset is one of PRESETS; its warm-up is of STEPS steps, of fewer the same share."""

    SECTION = "sld"
    KINDS = ("harm",)

    def problems(self):
        preset = self.config.sld.preset
        unknown = [] if preset in PRESETS else [f"config.sld.preset={preset!r}: choose from {', '.join(PRESETS)}"]
        return unknown + guidance_problems(self.config) + concept_problems(self.config)

    def make_drawing(self, models, mesh, workdir, judge):
        config, sd = self.config, models.sd
        if sd.schedule.prediction_type != "epsilon":
            raise ValueError(
                f"config.method='sld': {sd.name} has prediction_type={sd.schedule.prediction_type!r}, and its scale and"
                " threshold are of predicted noise: compare with another method"
            )
        guidance, texts = PRESETS[config.sld.preset].of_steps(config.sampling.steps), concepts(config)

        def avoid(request):
            text = ", ".join(texts[dose.value] for dose in request.values)
            return request._replace(edits=((text, 1.0),), values=())

        def draw(requests):
            return drawer(config, mesh)(sd, [avoid(request) for request in requests], guidance=guidance)

        settings = {"method": "sld", "guidance": dataclasses.asdict(guidance), "texts": texts}
        return Drawing(draw, weights_of(sd), settings)
