"""Methods: LiVO, and what it is compared with, a class each.

config.method names one of METHODS; or a Method of your own code, "package.module:Name"; any other name is a label of
LiVO's, for runs that differ in their config.
"""

from livo_jax.files.settings import import_named
from livo_jax.methods.base import Drawing, Method, Models, TrainedMethod, base, by_group, drawer, weights_of, with_unet
from livo_jax.methods.concept_ablation import ConceptAblation
from livo_jax.methods.dpo_unet import DPOUNet
from livo_jax.methods.fair_diffusion import FairDiffusion
from livo_jax.methods.livo import LiVO
from livo_jax.methods.negative import NegativePrompt
from livo_jax.methods.sld import SafeLatentDiffusion
from livo_jax.methods.uce import UnifiedConceptEditing
from livo_jax.methods.words import Words

__all__ = [
    "Drawing",
    "LiVO",
    "METHODS",
    "Method",
    "Models",
    "TrainedMethod",
    "base",
    "by_group",
    "drawer",
    "make_method",
    "weights_of",
    "with_unet",
]

METHODS = {
    "livo": LiVO,
    "concept_ablation": ConceptAblation,
    "dpo_unet": DPOUNet,
    "fair_diffusion": FairDiffusion,
    "negative": NegativePrompt,
    "sld": SafeLatentDiffusion,
    "uce": UnifiedConceptEditing,
    "words": Words,
}


def make_method(config) -> Method:
    """The method of config.method.

    Raises:
        ValueError: there is no such method, and those that there are; or it names a module or object that is not there,
            or one that is no Method.
    """
    if ":" not in config.method:
        if config.method not in METHODS and not config.train.steps:
            untrained = [name for name, kind in METHODS.items() if not issubclass(kind, TrainedMethod)]
            raise ValueError(
                f"config.method={config.method!r}, which trains nothing: choose from {', '.join(untrained)}, or name"
                " one of your own, package.module:Name"
            )
        return METHODS.get(config.method, LiVO)(config)
    kind = import_named(config.method, "config.method")
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise ValueError(f"config.method={config.method!r}: it is no subclass of livo_jax.methods.Method")
    return kind(config)
