"""What every method is: the interface, and what methods share."""

import abc
import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from livo_jax import values
from livo_jax.models.weights import split
from livo_jax.sampling.generate import generate
from livo_jax.sampling.requests import without_values

TRAINING = ("train", "loss", "data", "value_encoder", "checkpoint", "log", "profile")
TOKENS = (  # of the methods that have value tokens
    "value_encoder", "train.train_embeddings", "data.beside", "data.attributes", "data.anchors",
    "sampling.prompt_layout", "sampling.gated", "eval.rate_images", "eval.auto", "eval.combinations",
    "eval.keep_probabilities", "eval.strengths", "eval.ratios",
)  # fmt: skip


class Drawing(NamedTuple):
    """How a method draws.

    draw: draw(requests) -> [N, H, W, 3] uint8, from each request's noise; its values are those to follow.
    state: a tree of all arrays that it draws with, settings: what else its images depend on, for JSON: where these are
        equal, so are the images.
    trained: how many parameters it sets.
    seconds: that this took, where no training did it.
    """

    draw: Callable[[list], np.ndarray]
    state: Any
    settings: dict
    trained: int = 0
    seconds: float = 0.0


class Models(NamedTuple):
    """The models of a run.

    base: the StableDiffusion of config.model, as it is. sd: the one that draws, which may have another UNet.
    value_encoder: None, of a method that has none.
    """

    base: Any
    sd: Any
    value_encoder: nnx.Module | None = None


class Method(abc.ABC):
    """A way to follow values, of a config. This one draws with the model as it is; a TrainedMethod trains first.

    KINDS: of the values that it is for. UNREAD: sections and fields of a config that it does not read.
    HAS_TOKENS: whether it draws with value tokens, of a value encoder in its Models; each is for its value's
    keep_probability's share of a prompt's images, where any other method follows a value in all of them. TOGETHER:
    whether it follows several values in one image. EVEN: whether it deals a bias's attributes themselves to a prompt's
    images, each to as many. SECTION: of a config, with settings that configs/common.py has not; "" where it needs none.
    """

    SECTION = ""
    KINDS: tuple[str, ...] = ("bias", "harm")
    HAS_TOKENS, TOGETHER, EVEN = False, True, False
    UNREAD: tuple[str, ...] = (*TRAINING, *TOKENS, "preferences")

    def __init__(self, config):
        self.config = config

    def problems(self) -> list[str]:
        """What in the config it cannot work with, beside fields that it does not read."""
        return []

    @abc.abstractmethod
    def make_drawing(self, models: Models, mesh, workdir, judge) -> Drawing:
        """How it draws with the models of a run.

        Args:
            workdir: where it keeps what it makes. judge: as judges.load makes it, for a method that looks at images.

        Raises:
            ValueError: it cannot work with such a model.
        """


class TrainedMethod(Method):
    """A method that trains a module, whose RULES say how it is divided over a mesh.

    CONCEPTS: whether its batches have concepts, as data.batches has them.
    """

    UNREAD = ()
    CONCEPTS = False

    @abc.abstractmethod
    def make_module(self, sd) -> nnx.Module:
        """The untrained module for a StableDiffusion. Under nnx.eval_shape its shapes, without weights."""

    @abc.abstractmethod
    def start(self, sd, mesh) -> nnx.Module:
        """The module that training starts from, on the mesh."""

    @abc.abstractmethod
    def make_loss(self, networks):
        """loss(params, frozen, batch, noise) -> (loss, metrics), as training.objective.make_loss."""

    @abc.abstractmethod
    def models(self, sd, module) -> Models:
        """The models of a run with the module, trained so far."""

    @property
    def compares_pairs(self) -> bool:
        """Whether the loss compares the two images of a pair: a log-ratio of both, which is of one prompt."""
        return False

    @property
    def passes(self) -> tuple[int, int, int, int]:
        """Of a step: images of a pair, the UNet's forward and backward passes, and readings of the text encoder."""
        return 2, 2, 1, 1  # the policy's conditioning and the reference's


def with_unet(sd, unet):
    """The StableDiffusion with another UNet."""
    other = copy.copy(sd)
    other.unet = unet
    return other


def check_cross_attention(config, sd):
    """Raises ValueError for a model without, which a method of it cannot edit."""
    if sd.family.DENOISER != "unet":
        raise ValueError(
            f"config.method={config.method!r} changes a UNet's cross-attention, and {sd.name} is a"
            f" {sd.family.NAME}, whose transformer has none: take livo, dpo_unet, negative or words"
        )


def quantised_problems(config) -> list[str]:
    """What keeps a method that replaces weights from a model whose weights are of 8 bits."""
    found = f"config.quantised={config.quantised!r}: config.method={config.method!r} replaces weights, set it to ''"
    return [found] if config.quantised else []


def guidance_problems(config) -> list[str]:
    """What keeps a guidance that edits a guided prediction from working with config.sampling."""
    scale = config.sampling.guidance_scale
    found = f"config.sampling.guidance_scale={scale}: config.method={config.method!r} edits a guided prediction, and at"
    return [] if scale > 1 else [f"{found} most 1 is no guidance: choose above 1, or compare with another method"]


def weights_of(sd) -> list[dict]:
    return [split(module)[1] for module in (sd.text_encoder, sd.unet, sd.vae)]


def drawer(config, mesh):
    """generate with the settings of config.sampling and config.eval.seed."""
    return functools.partial(generate, seed=config.eval.seed, mesh=mesh, **config.sampling.to_dict())


def draw_plain(config, sd, mesh, settings: dict, **facts) -> Drawing:
    """The Drawing of a StableDiffusion as it is, whatever is asked of it."""

    def draw(requests):
        return drawer(config, mesh)(sd, without_values(requests))

    return Drawing(draw, weights_of(sd), settings, **facts)


def base(config, sd, mesh) -> Drawing:
    """The model that methods are compared with."""
    return draw_plain(config, sd, mesh, {"method": "base"})


def concepts(config) -> dict[str, str]:
    """The harms by their statements, in words: the negative prompt, or else what calls for it first."""
    return {value.statement: concept(value) for value in harms(config)}


def harms(config) -> list:
    return [value for value in values.load_principles(config) if value.kind == "harm"]


def concept(value) -> str:
    return value.negative or next(iter(value.keywords), "")


def concept_problems(config) -> list[str]:
    """A line for each harm that no words name, as negative prompts and Safe Latent Diffusion want it."""
    return [
        f"config.method={config.method!r} needs negative or keywords of [{value.name}], which has neither"
        for value in harms(config)
        if not concept(value)
    ]


def by_group(requests, group, draw) -> np.ndarray:
    """The images of requests, those of one group(request) drawn together, by draw(group, requests).

    The groups come as the requests do: in every process the same.
    """
    places, images = {}, {}
    for i, request in enumerate(requests):
        places.setdefault(group(request), []).append(i)
    for key, rows in places.items():
        images |= zip(rows, draw(key, [requests[i] for i in rows]))
    return np.stack([images[i] for i in range(len(requests))])
