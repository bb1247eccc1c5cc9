"""The models of a run: as it starts, and as it left them."""

import functools
import json

from flax import nnx

from livo_jax import methods, seeds, sharding
from livo_jax.files.directories import resolve_directory
from livo_jax.files.loras import find_lora
from livo_jax.files.modules import read_dtype
from livo_jax.files.settings import differences, flatten
from livo_jax.models.weights import split
from livo_jax.runs.check import check_config, check_with_model
from livo_jax.runs.checkpoint import Checkpoints
from livo_jax.runs.workdir import as_now, read_gates, recipe, where_moved
from livo_jax.sampling.stable_diffusion import StableDiffusion
from livo_jax.training.optimizer import make_optimizer
from livo_jax.training.step import state_shapes, trained_params


def adapt(sd: StableDiffusion, config):
    """Merges config.loras into the model that was loaded, and has it keep weights as config.quantised says."""
    if config.loras:
        sd.merge_loras(config.loras)
    if config.quantised:
        sd.quantise(config.quantised)


def load_base(config, mesh) -> StableDiffusion:
    """The StableDiffusion of config.model with config.loras, config.quantised, on the mesh.

    Errors as read_dtype, from_pretrained and merge_loras have them.
    """
    where = functools.partial(sharding.by_rules, mesh=mesh) if config.shard_frozen else sharding.replicated(mesh)
    for entry in config.loras:  # before minutes of reading
        find_lora(entry)
    dtype, variant = read_dtype(config.dtype, "config.dtype"), config.variant or None
    if config.random_weights:
        seed = seeds.check(config.seed, "config.seed")
        sd = StableDiffusion.from_config(config.model, dtype, seed=seed, sharding=where)
    else:
        sd = StableDiffusion.from_pretrained(config.model, dtype, variant=variant, sharding=where)
    adapt(sd, config)
    sd.guidance_distilled = config.guidance_distilled
    return sd


def load_models(config, mesh, base: StableDiffusion | None = None):
    """The frozen StableDiffusion of config.model, and the module that training starts from, on the mesh.

    Args:
        base: of load_base, if that is here already.

    Raises:
        FileNotFoundError, ValueError: as StableDiffusion.from_pretrained and value_encoders.start; a value encoder of
            another model.
    """
    sd = base or load_base(config, mesh)
    module = methods.make_method(config).start(sd, mesh)
    compute_on(mesh, config, sd, module)
    return sd, module


def compute_on(mesh, config, sd: StableDiffusion, trained):
    """Has the modules that a step merges keep for the backward pass, and gather, what the config and the mesh want.

    trained: the module that is trained; of one that is divided over the mesh by sharding.RULES each of its `towers`,
        text encoders, gathers its weights.
    """
    sd.unet.remat = config.train.remat
    gather = functools.partial(sharding.gather, mesh=mesh)
    if config.shard_frozen:
        sd.unet.gather = gather
        for part in sd.text_encoder.encoders:
            part.encoder.gather = gather
    if trained.RULES is sharding.RULES and mesh.shape["fsdp"] > 1:
        for tower in trained.towers:
            tower.encoder.gather = gather


def restore_run(config, workdir, mesh, step: int | None = None, base: StableDiffusion | None = None) -> methods.Models:
    """The models of a run: trained, or with config.value_encoder.start as it is.

    Of a method that trains nothing (config.train.steps is 0) that is the base alone.

    Args:
        step: of an earlier checkpoint than the newest.
        base: of load_base, if that is here already; `compute_on` has it keep and gather what the config wants.

    Raises:
        FileNotFoundError: `workdir` has no checkpoint and config.value_encoder no start.
        ValueError: the config cannot work, or the checkpoint is of another one.
    """
    method = methods.make_method(config)
    if not isinstance(method, methods.TrainedMethod):
        sd = base or load_base(config, mesh)
        return methods.Models(sd, sd)
    workdir = resolve_directory(workdir)
    checkpoints = Checkpoints(workdir)
    trained = checkpoints.latest_step() is not None
    if not trained and not (method.HAS_TOKENS and config.value_encoder.start):
        raise FileNotFoundError(
            f"{checkpoints.directory} has no checkpoint: train first, with the same --workdir, or give a trained value"
            " encoder by --config.value_encoder.start=DIRECTORY_OR_HUB_ID"
        )
    if trained:
        ours, theirs = (
            {name: of[name] for name in ("method", "value_encoder", config.method) if name in of}
            for of in (json.loads(config.to_json()), recipe(workdir) or {})
        )
        ours = flatten(ours)
        if found := differences(where_moved(as_now(theirs, ours), ours), ours):
            raise ValueError(
                f"{workdir} holds another value encoder: to use one that is trained already, name a new --workdir\n  "
                + "\n  ".join(found)
            )
    check_config(config, mesh)
    if not trained:
        sd, module = load_models(config, mesh, base)
    else:  # what training started from may be gone: its shapes are known
        sd = base or load_base(config, mesh)
        module = nnx.eval_shape(lambda: method.make_module(sd))
        compute_on(mesh, config, sd, module)
    check_with_model(config, sd, judge=False)
    if trained:
        graph, params = split(module)
        state = state_shapes(mesh, params, make_optimizer(config), config, module.RULES)
        module = nnx.merge(graph, trained_params(checkpoints.restore(state, step=step)))
    models = method.models(sd, module)
    if trained and models.value_encoder is not None:  # gates are of the newest step
        models.value_encoder.gates = read_gates(workdir) if step is None else ()
    return models
