"""Methods that LiVO is compared with, a module each, and what the evaluation needs of any method.

config.method names one: "livo" and what else trains a value encoder, what trains the UNet, or a module here. One that
trains nothing may be of your own code, "package.module:Name": an object with KINDS, the kinds of values that it is for,
and make(config, sd, mesh, workdir, judge), which returns a Method, as words.py has them.
"""

import copy
import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from livo_jax import values
from livo_jax.files.settings import import_named
from livo_jax.models.weights import one_key, split
from livo_jax.sampling.generate import generate
from livo_jax.training.step import but_embeddings

UNET = ("concept_ablation", "dpo_unet")  # what trains the UNet

DRAWN = ("fair_diffusion", "negative", "sld", "uce", "words")  # what trains nothing


class Method(NamedTuple):
    """How a method draws.

    draw: draw(requests) -> [N, H, W, 3] uint8, from each request's noise; its values are those to follow.
    state: a tree of all arrays that it draws with, settings: what else its images depend on, for JSON: where these are
        equal, so are the images.
    kinds: of the values that it is for.
    tokens: whether it has a token of each value, which is for the value's keep_probability's share of a prompt's
        images. Otherwise a value is followed in all of them.
    together: whether it follows several values in one image.
    even: whether it deals a bias's attributes themselves to a prompt's images, each to as many.
    trained: how many parameters it sets.
    seconds: that this took, where no training did it.
    """

    draw: Callable[[list], np.ndarray]
    state: Any
    settings: dict
    kinds: tuple[str, ...] = ("bias", "harm")
    tokens: bool = False
    together: bool = True
    even: bool = False
    trained: int = 0
    seconds: float = 0.0


def weights(*modules) -> list[dict]:
    return [split(module)[1] for module in modules]


def with_unet(sd, unet):
    """The StableDiffusion with another UNet."""
    other = copy.copy(sd)
    other.unet = unet
    return other


def networks(sd) -> list[dict]:
    return weights(sd.text_encoder, sd.unet, sd.vae)


def drawer(config, mesh):
    """generate with the settings of config.sampling and config.eval.seed."""
    return functools.partial(generate, seed=config.eval.seed, mesh=mesh, **config.sampling.to_dict())


def base(config, sd, mesh) -> Method:
    """The model as it is, whatever is asked of it."""
    plain = lambda requests: drawer(config, mesh)(sd, [request._replace(values=()) for request in requests])
    return Method(plain, networks(sd), {"method": "base"})


def load(config, sd, value_encoder, mesh, workdir, judge=None) -> Method:
    """The method of config.method.

    Args:
        sd: the StableDiffusion that it draws with; of a method that trains the UNet, the trained one.
        value_encoder: what it trained, or None.
        workdir: where a method keeps what it makes. judge: as judges.load makes it, for one that looks at images.

    Raises:
        ValueError: there is no such method, and those that there are.
    """
    if value_encoder is not None:
        tokens = functools.partial(drawer(config, mesh), sd, value_encoder=value_encoder)
        (params,) = weights(value_encoder)
        keep = lambda trained, part: part if trained or config.train.train_embeddings else None
        trained = sum(x.size for x in jax.tree.leaves(jax.tree.map(keep, but_embeddings(params), params)))
        own = {name: getattr(value_encoder, name, None) for name in ("states", "reads_prompt")}
        # Only what is not its kind's default: images that were drawn before keep their folder.
        own = {name: x for name, x in own.items() if x != getattr(type(value_encoder), name, None)}
        settings = {"method": "value tokens"} | own
        return Method(tokens, [networks(sd), params], settings, tokens=True, trained=trained)
    if module := of_unet(config):
        update = nnx.eval_shape(lambda: module.Update(config, sd, one_key()))
        size = sum(x.size for x in jax.tree.leaves(weights(update)))
        settings = {"method": config.method}
        return base(config, sd, mesh)._replace(settings=settings, kinds=module.KINDS, trained=size)
    if not trains_nothing(config):
        raise ValueError(
            f"config.method={config.method!r}, which trains nothing: choose from {', '.join(DRAWN)}, or name one of"
            " your own, package.module:Name"
        )
    return module_of(config).make(config, sd, mesh, workdir, judge)


def of_unet(config):
    """The module of a method that trains the UNet, None of others.

    It has Update(config, sd, rngs), what is trained: its applied(unet) is the UNet with it, which computes in the dtype
    that it had; by its RULES it is divided over a mesh; make_loss, as step.make_loss; and KINDS, of the values that it
    is for.
    """
    return module_of(config) if config.method in UNET else None


def trains_nothing(config) -> bool:
    """Whether config.method draws with the model as it is."""
    return config.method in DRAWN or ":" in config.method


def module_of(config):
    """What config.method names: a module here, or an object of the user's."""
    if ":" in config.method:
        return import_named(config.method, "config.method", ("KINDS", "make"))
    return importlib.import_module(f"{__name__}.{config.method}")


def kinds(config) -> tuple[str, ...]:
    """Of the values that config.method is for."""
    return module_of(config).KINDS if config.method in UNET or trains_nothing(config) else ("bias", "harm")


def compares_pairs(config) -> bool:
    """Whether the loss compares the two images of a pair: a log-ratio of both, which is of one prompt."""
    return config.method == "dpo_unet" or (config.method not in UNET and config.loss.form in ("dpo", "ipo"))


def concepts(config) -> dict[str, str]:
    """The harms by their statements, in words: the negative prompt, or else what calls for it first."""
    harms = (value for value in values.load_principles(config) if value.kind == "harm")
    return {value.statement: value.negative or value.keywords[0] for value in harms}


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
