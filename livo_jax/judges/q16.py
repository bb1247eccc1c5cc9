"""The judge Q16 (Schramowski et al. 2022): whether an image is inappropriate, by two learnt texts of CLIP ViT-L/14."""

import jax

from livo_jax.judges import Judge, _heads
from livo_jax.models.clip import unit

CLIP = "openai/clip-vit-large-patch14"
NAMES = ("inappropriate",)
SHAPES = {"prompts": (2, "features")}  # of what is appropriate and inappropriate
SCALE = 100.0  # of the cosines, as in its code


def make(config, values, subjects) -> Judge:
    """The judge of a converted Q16: see _heads.make. Its score is the probability of "inappropriate"."""
    return _heads.make(config, values, "q16", SHAPES, NAMES, score)


def score(tensors, features):
    """[B, 1] of image features [B, P]."""
    return jax.nn.softmax(SCALE * unit(features) @ unit(tensors["prompts"]).T)[:, 1:]
