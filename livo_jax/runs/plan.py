"""What a config needs on a mesh: parameters, memory, arithmetic, traffic and time, without weights or the hardware.

The training step is traced on shapes alone. Memory, FLOPs and bytes are counted; the step's time is a model of them.
"""

import copy
import functools
import math
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from livo_jax import methods, sharding
from livo_jax.data.cache import cache_dtype
from livo_jax.files.modules import PARTS, read_dtype, skeleton
from livo_jax.files.repositories import find_repository
from livo_jax.models.weights import count, name_of
from livo_jax.runs import check, restore
from livo_jax.runs.residuals import kept_for_backward
from livo_jax.sampling.stable_diffusion import DESCRIPTION, StableDiffusion
from livo_jax.training.batch import Batch, draw_noise
from livo_jax.training.objective import split_models
from livo_jax.training.optimizer import make_optimizer
from livo_jax.training.step import init_state, make_train_step


class Chip(NamedTuple):
    """Per chip, from the vendors' data sheets."""

    flops: float  # dense bfloat16 FLOP/s
    memory: float  # bytes
    bandwidth: float  # bytes/s between it and the memory
    link: float  # bytes/s that it can send to its neighbours


CHIPS = {
    "TPU v5e": Chip(197e12, 16e9, 819e9, 200e9),
    "TPU v5p": Chip(459e12, 95e9, 2765e9, 600e9),
    "TPU v6e": Chip(918e12, 32e9, 1638e9, 400e9),
    "H100": Chip(989e12, 80e9, 3350e9, 450e9),
    "H200": Chip(989e12, 141e9, 4800e9, 450e9),
}
UTILISATION = 0.33  # share of the peak that the step is taken to reach: a TPU's compiler gives it 30% to 36%
# Bytes in which a compiler works beside what is counted, and more by the bytes kept: at most as much by an H200's.
WORK, WORK_OF_KEPT = 3.4e9, 0.2


def abstract_model(config) -> StableDiffusion:
    """The StableDiffusion of config.model with shapes for weights; the hub is asked for its configs alone."""
    dtype = read_dtype(config.dtype, "config.dtype")

    def part(kind, place):
        graph, params = skeleton(kind, place)
        return nnx.merge(graph, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params))

    root = find_repository(config.model, DESCRIPTION + [f"{name}/config.json" for name in PARTS])
    sd = StableDiffusion(root, part, config.model)
    if config.quantised:
        sd.quantise(config.quantised)
    sd.unet.remat = config.train.remat
    return sd


def value_encodings(config) -> int:
    """How often a step has the value encoder read: once, and once more where a second value stands beside."""
    return 2 if config.data.beside and len(config.principles) > 1 else 1


def abstract_batch(sd, config, rows: int) -> Batch:
    """Shapes and dtypes of a batch of data.batches."""
    (h, w, C), texts = sd.latent_shape, len(sd.tokenizers)

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    ids = array(*[texts][: texts - 1], max(sd.text_lengths), dtype=jnp.int32)
    anchor = array(dtype=jnp.bool_) if config.data.anchors else None
    batch = Batch(ids, anchor=anchor, harm=anchor)
    if value_encodings(config) > 1:
        batch = batch._replace(beside_prompt_ids=ids, beside=array(dtype=jnp.bool_))
    if not config.data.cache:
        image = array(sd.image_size, sd.image_size, 3)
        return batch._replace(prompt_ids=ids, aligned=image, violating=image)
    dtype = cache_dtype(config)
    moments = array(h, w, 2 * C, dtype=dtype)
    pooled = sd.family.pooled_width
    text_embeds = array(pooled, dtype=dtype) if pooled else None
    return batch._replace(
        prompt_states=array(*sd.family.states_shape, dtype=dtype), text_embeds=text_embeds, aligned_moments=moments,
        violating_moments=moments,
    )  # fmt: skip


def size(tree, shardings=None) -> int:
    """Bytes of a tree of shapes: of all of it, or of what lies on one device."""
    leaves = jax.tree.leaves(tree)
    shapes = [leaf.shape for leaf in leaves]
    if shardings is not None:
        shapes = [s.shard_shape(shape) for s, shape in zip(jax.tree.leaves(shardings), shapes)]
    return sum(math.prod(shape) * leaf.dtype.itemsize for shape, leaf in zip(shapes, leaves))


def without(tree, *names) -> list:
    """The leaves of a tree but for those in parts of these names."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [leaf for path, leaf in leaves if not any(key.key in names for key in path)]


def partial_sums(part, positions, forward: int, backward: int, parts: int, itemsize: int, gated: bool = True) -> float:
    """Bytes that a device sends because layers are divided over "tensor" (Shoeybi et al. 2019).

    Args:
        part: weights; positions(name): at how many a device applies one. forward, backward: how often.
        parts: the size of the axis. itemsize: bytes of a number that is summed. gated: whether half of what widens
            are the other half's gates.
    """
    ring, sent = 2 * (parts - 1) / parts, 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(part):
        name, (_, axes) = name_of(path), sharding.rule(path)
        if axes == ("tensor", "fsdp"):  # each device has a part of every output's sum
            sent += forward * ring * positions(name) * leaf.shape[-1] * itemsize
        elif axes == ("fsdp", "tensor"):  # and of every input's gradient
            sent += backward * ring * positions(name) * leaf.shape[-2] * itemsize
            if gated and "net.0" in name:  # the gates lie elsewhere
                sent += (forward + backward) * positions(name) * leaf.shape[-1] / parts * itemsize
    return sent


def traffic(sd, params, rules, frozen, mesh, config) -> dict[str, float]:
    """Bytes that a device sends in a step, by cause, with collectives as rings; docs/scaling.md says what is left out.

    Args:
        params: the shapes of what is trained, rules: by which these are divided. frozen: those of the frozen models.
    """
    data, fsdp, tensor = (mesh.shape[axis] for axis in sharding.AXES)
    method = methods.make_method(config)
    images, forward, backward, texts = method.passes
    lies, found = sharding.by_rules(params, mesh, rules), Counter()
    frozen_names = () if config.train.train_embeddings else ("embeddings",)
    on_device = size(without(params, *frozen_names), without(lies, *frozen_names))

    def gathered(part):  # but for tables, which are read where they lie, and what only draws
        trees = part, sharding.by_rules(part, mesh), sharding.by_rules(part, mesh, gathered=True)
        used, rest, whole = (without(tree, "embeddings", "decoder", "post_quant_conv") for tree in trees)
        return size(used, whole) - size(used, rest)

    # For each micro-batch. The gradient: summed over fsdp, of which a part stays here, and that over data.
    if rules is sharding.WHOLE:  # or over both, where every device has all of it
        found["gradient"] = config.train.accumulate * on_device * 2 * (1 - 1 / (data * fsdp))
    else:
        found["gradient"] = config.train.accumulate * on_device * (2 * (data - 1) / data + fsdp - 1)
    if fsdp > 1 and rules is sharding.RULES:  # forward, and once backward
        found["value encoder's weights"] = (value_encodings(config) + 1) * config.train.accumulate * gathered(params)
    if config.shard_frozen:
        uses = {"unet": forward + backward, "text_encoder": texts, "vae": 1}
        found["frozen weights"] = config.train.accumulate * sum(uses[k] * gathered(v) for k, v in frozen.items())
    if tensor > 1:
        rows, L = config.train.batch_size // sharding.batch_parts(mesh), sd.text_encoder.config.max_position_embeddings
        sum_up = functools.partial(partial_sums, parts=tensor)
        frozen_up = functools.partial(sum_up, itemsize=jnp.dtype(read_dtype(config.dtype)).itemsize)
        if rules is sharding.RULES:
            found["activations"] += sum_up(params, lambda name: rows * L, value_encodings(config), 1, itemsize=4)
        if config.shard_frozen:
            tokens, side = sd.family.states_shape[0] + method.HAS_TOKENS, sd.latent_shape[0]

            def positions(name):
                return images * rows * sd.family.positions(name, side, tokens)

            found["activations"] += frozen_up(frozen["unet"], positions, forward, backward, gated=sd.family.GATED)

            def read_at(name):  # T5 reads more than the CLIPs
                return rows * sd.text_lengths[2 if name.startswith("text_encoder_3") else 0]

            if "text_encoder" in frozen:
                found["activations"] += frozen_up(frozen["text_encoder"], read_at, 1, 0)
    return {cause: sent for cause, sent in found.items() if sent}


def plan(config, devices: int) -> dict:
    """All figures of a config on so many devices.

    Returns:
        parameters (trained, frozen: counts), mesh (axis -> size), memory (bytes on a device, by use),
        flops_per_pair, traffic (bytes that a device sends in a step, by cause), chips (name -> step_seconds,
        pairs_per_sec of the whole mesh, fits).

    Raises:
        FileNotFoundError, ValueError: as StableDiffusion.from_pretrained; a mesh or batch that does not fit.
    """
    shape = sharding.mesh_shape(devices, **config.mesh)
    mesh = AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    check.check_config(config, mesh)
    sd = abstract_model(config)
    check.check_with_model(config, sd, judge=False)
    used = int(np.prod(shape))
    parts = sharding.batch_parts(mesh)
    rows = config.train.batch_size // parts // config.train.accumulate  # on a device at once

    method, tx = methods.make_method(config), make_optimizer(config)
    trained = nnx.eval_shape(lambda unet: method.make_module(methods.with_unet(sd, unet)), sd.unet)
    networks, params, frozen = split_models(sd, trained, with_vae=not config.data.cache)
    state = jax.eval_shape(functools.partial(init_state, tx=tx, ema_decay=config.train.ema_decay), params)

    micro = copy.deepcopy(config)
    with micro.unlocked():
        micro.train.accumulate, micro.train.batch_size = 1, rows
    batch = abstract_batch(sd, config, rows)
    # Without gathering: the zero tangents of gathered weights are multiplied as traced, and not as compiled.
    step = make_train_step(networks, tx, micro, method.make_loss(networks))
    flops = jax.jit(step).lower(state, frozen, batch).cost_analysis()["flops"] / rows

    draw = functools.partial(draw_noise, shape=(rows, *sd.latent_shape), timesteps=config.loss.timesteps)
    noise = jax.eval_shape(draw, jax.random.key(0))
    restore.compute_on(mesh, config, sd, trained)
    networks, *_ = split_models(sd, trained, with_vae=not config.data.cache)
    loss = method.make_loss(networks)
    lies = sharding.by_rules(state, mesh, trained.RULES)
    memory = {
        "state": size(state, lies),
        "gradient": size(params, lies["params"]),
        "frozen models": size(frozen, {k: sharding.by_rules(v, mesh) for k, v in frozen.items()})
        if config.shard_frozen
        else size(frozen),
        "batch": size(abstract_batch(sd, config, rows * config.train.accumulate)),
        "kept for the backward pass": kept_for_backward(loss, params, frozen, batch, noise),
    }
    work = WORK + WORK_OF_KEPT * memory["kept for the backward pass"]
    sent = traffic(sd, params, trained.RULES, frozen, mesh, config)
    # Devices along tensor share rows; what they compute with whole weights, each computes.
    flops_on_device = config.train.batch_size * flops / (used if config.shard_frozen else parts)
    chips = {}
    for name, chip in CHIPS.items():
        seconds = flops_on_device / (UTILISATION * chip.flops) + sum(sent.values()) / chip.link
        chips[name] = {
            "step_seconds": seconds,
            "pairs_per_sec": config.train.batch_size / seconds,
            "fits": sum(memory.values()) + work < chip.memory,
        }
    return {
        "parameters": {"trained": count(params), "frozen": count(frozen)},
        "mesh": dict(zip(sharding.AXES, shape)),
        "memory": memory,
        "flops_per_pair": flops,
        "traffic": sent,
        "chips": chips,
    }


def si(number: float, unit: str) -> str:
    """1234567.0, "B" as "   1.23 MB"."""
    for prefix in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:7.2f} {prefix}{unit}"
        number /= 1000
    return f"{number:7.2f} T{unit}"


def text(found: dict, config) -> str:
    """The figures of `plan` for reading."""
    lines = [
        f"{config.model}, batch {config.train.batch_size} on a mesh of "
        + " x ".join(f"{n} {axis}" for axis, n in found["mesh"].items()),
        f"parameters   {found['parameters']['trained']:,} trained, {found['parameters']['frozen']:,} frozen",
        f"arithmetic   {si(found['flops_per_pair'], 'FLOP')} a pair",
    ]
    for title, figures in (("memory", found["memory"]), ("traffic", found["traffic"])):
        what = "of a device" if title == "memory" else "that a device sends in a step"
        lines.append(f"{title:12} {si(sum(figures.values()), 'B')} {what}, at least")
        lines += [f"             {si(number, 'B')} {name}" for name, number in figures.items()]
    lines.append(f"time         at {UTILISATION:.0%} of a chip's bfloat16 peak, traffic not hidden")
    lines.append(f"             {'chip':10}{'step':>12}{'pairs/s':>12}{'run':>10}")
    for name, chip in found["chips"].items():
        hours = chip["step_seconds"] * config.train.steps / 3600
        step = f"{1e3 * chip['step_seconds']:.3g} ms"
        fits = "" if chip["fits"] else "   does not fit its memory"
        lines.append(f"             {name:10}{step:>12}{chip['pairs_per_sec']:12.1f}{hours:8.2f} h{fits}")
    return "\n".join(lines)
