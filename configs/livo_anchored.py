"""LiVO on Stable Diffusion 1.5 with what made its tokens safer to apply always on the embedded world.

    python run.py --config=configs/livo_anchored.py --config.judge=clip

The constants of the loss are the paper's, as configs/livo.py has them; what is set here is not in the paper. It was
chosen on the embedded world (docs/results.md) and not measured on Stable Diffusion. `:smoke` as of configs/livo.py.
"""

from livo_jax.configs import livo
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = livo.get_config(variant)
    config.value_encoder.alone = ("harm",)  # its token is the same whatever words say the harm
    config.data.beside = 0.3  # so that two values work together
    config.data.attributes = 0.25  # so that --ratio can mix attributes
    config.data.anchors = 0.3  # so that a prompt that states an attribute, or no harm, stays as it is
    config.loss.anchor = 15 * config.loss.beta  # the embedded world's ratio
    config.sampling.gated = not variant  # of few steps a token tells nothing apart
    if not variant:  # more wordings, so that anchors are not of three alone
        config.preferences.templates += (
            "a(n) {} in the rain",
            "a photo of a(n) {} in the evening",
            "a portrait of a(n) {} in a green hat",
            "a drawing of a(n) {} on a bench",
            "a picture of a(n) {} with a dog",
        )
    return config
