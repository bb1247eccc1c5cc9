"""The models of a run: as it starts, and as it left them."""

import functools
import json

import jax
import numpy as np
from flax import nnx

from livo_jax import methods, seeds, sharding, value_encoders
from livo_jax.files.directories import find
from livo_jax.files.modules import read_dtype
from livo_jax.files.settings import differences, flatten
from livo_jax.models.weights import put, split
from livo_jax.runs.check import check_config, check_with_model
from livo_jax.runs.checkpoint import Checkpoints
from livo_jax.runs.workdir import as_now, recipe
from livo_jax.sampling.stable_diffusion import StableDiffusion
from livo_jax.training.step import (
    make_optimizer,
    state_on,
    trained_params,
)
from livo_jax.value_encoders.base import check_value_encoder


def load_base(config, mesh) -> StableDiffusion:
    """The StableDiffusion of config.model on the mesh. Errors as read_dtype and from_pretrained have them."""
    where = functools.partial(sharding.by_rules, mesh=mesh) if config.shard_frozen else sharding.replicated(mesh)
    dtype, variant = read_dtype(config.dtype, "config.dtype"), config.variant or None
    if config.random_weights:
        seed = seeds.check(config.seed, "config.seed")
        return StableDiffusion.from_config(config.model, dtype, seed=seed, sharding=where)
    return StableDiffusion.from_pretrained(config.model, dtype, variant=variant, sharding=where)


def load_models(config, mesh, base: StableDiffusion | None = None):
    """The frozen StableDiffusion of config.model, and the value encoder to start from, on the mesh.

    A method that trains the UNet has its Update (methods/) in the place of the value encoder.

    Args:
        base: of load_base, if that is here already.

    Raises:
        FileNotFoundError, ValueError: as StableDiffusion.from_pretrained and value_encoders.start; a value encoder of
            another model.
    """
    sd = base or load_base(config, mesh)
    if module := methods.of_unet(config):
        graph, params = split(module.Update(config, sd, nnx.Rngs(seeds.key(config.seed))))
        update = nnx.merge(graph, jax.tree.map(lambda x: put(np.asarray(x), sharding.replicated(mesh)), params))
        compute_on(mesh, config, sd)
        return sd, update
    value_encoder = value_encoders.start(config, sd, mesh)
    check_value_encoder(sd, value_encoder)
    compute_on(mesh, config, sd, value_encoder)
    return sd, value_encoder


def compute_on(mesh, config, sd: StableDiffusion, value_encoder=None):
    """Has the modules that a step merges keep for the backward pass, and gather, what the config and the mesh want."""
    sd.unet.remat = config.train.remat
    gather = functools.partial(sharding.gather, mesh=mesh)
    if config.shard_frozen:
        sd.unet.gather = gather
        for tower in sd.text_encoder.towers:
            tower.encoder.gather = gather
    if value_encoder and mesh.shape["fsdp"] > 1 and config.value_encoder.kind == "full":
        for tower in value_encoder.towers:
            tower.encoder.gather = gather


def with_update(sd, update) -> StableDiffusion:
    """The StableDiffusion with its UNet trained."""
    return methods.with_unet(sd, update.applied(sd.unet))


def restore_run(config, workdir, mesh, step: int | None = None, base: StableDiffusion | None = None):
    """The frozen StableDiffusion and the value encoder of a run: trained, or config.value_encoder.start as it is.

    Of a method that trains nothing (config.train.steps is 0), or the UNet, which the StableDiffusion then has, there is
    no value encoder, but None.

    Args:
        step: of an earlier checkpoint than the newest.
        base: of load_base, if that is here already; it stays as it is.

    Raises:
        FileNotFoundError: `workdir` has no checkpoint and config.value_encoder no start.
        ValueError: the config cannot work, or the checkpoint is of another one.
    """
    if not config.train.steps:
        return base or load_base(config, mesh), None
    workdir = find(workdir)
    checkpoints = Checkpoints(workdir)
    trained = checkpoints.latest_step() is not None
    of_unet = methods.of_unet(config)
    if not trained and (of_unet or not config.value_encoder.start):
        raise FileNotFoundError(
            f"{checkpoints.directory} has no checkpoint: train first, with the same --workdir, or give a trained value"
            " encoder by --config.value_encoder.start=DIRECTORY_OR_HUB_ID"
        )
    of = lambda recipe: {name: recipe[name] for name in ("method", "value_encoder", config.method) if name in recipe}
    if trained:
        ours = of(json.loads(config.to_json()))
        if found := differences(as_now(of(recipe(workdir) or {}), ours), flatten(ours)):
            raise ValueError(
                f"{workdir} holds another value encoder: to use one that is trained already, name a new --workdir\n  "
                + "\n  ".join(found)
            )
    check_config(config, mesh)
    sd, value_encoder = load_models(config, mesh, base)
    check_with_model(config, sd, judge=False)
    if trained:
        graph, params = split(value_encoder)
        state = checkpoints.restore(
            state_on(mesh, params, make_optimizer(config), config, value_encoder.RULES), step=step
        )
        value_encoder = nnx.merge(graph, trained_params(state))
    return (with_update(sd, value_encoder), None) if of_unet else (sd, value_encoder)
