"""Meshes and partition rules; what a compiled step sends between devices, and what it holds of sharded weights."""

import math
import re

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from configs import tiny
from livo_jax import sharding
from livo_jax.models.clip import CLIPTextModel
from livo_jax.models.unet import UNet2DConditionModel
from livo_jax.models.vae import AutoencoderKL
from livo_jax.models.weights import one_key, split
from livo_jax.runs import plan, restore
from livo_jax.training.objective import make_loss, split_models
from livo_jax.training.step import jit_step, make_train_step

BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}
COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\((.*)"
)
SENT = {  # bytes that each of n devices sends for a result of so many, by rings
    "all-reduce": lambda n, size: 2 * (n - 1) / n * size,
    "all-gather": lambda n, size: (n - 1) / n * size,
    "reduce-scatter": lambda n, size: (n - 1) * size,
    "all-to-all": lambda n, size: (n - 1) / n * size,
    "collective-permute": lambda n, size: size,
}


def collectives(compiled) -> list[tuple[str, list[int], int]]:
    """The kind of each collective of a compiled program, the bytes of each array in it, and among how many it is."""
    found = []
    for result, kind, rest in COLLECTIVE.findall(compiled.as_text()):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", result)
        sizes = [BYTES[dtype] * math.prod(map(int, filter(None, dims.split(",")))) for dtype, dims in arrays]
        found.append((kind, sizes, 2 if kind == "collective-permute" else group_size(rest)))
    return found


def group_size(text: str) -> int:
    """Of replica_groups, in whichever of XLA's three notations."""
    if found := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", text):  # ['a'=4,'b'=2] {'b'}, or {'a':(1)2}
        axes = dict(re.findall(r"('\w+')=(\d+)", found[1]))
        return math.prod(int(part or axes[axis]) for axis, part in re.findall(r"('\w+')(?::\(\d+\)(\d+))?", found[2]))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", text):  # [4,2]<=[8]
        return int(found[1])
    return len(re.search(r"replica_groups=\{\{([\d,]+)\}", text)[1].split(","))  # {{0,1},{2,3}}


@pytest.mark.parametrize(
    "sizes, shape",
    [((-1, 1, 1), (8, 1, 1)), ((-1, 2, 2), (2, 2, 2)), ((2, -1, 2), (2, 2, 2)), ((4, 1, 1), (4, 1, 1))],
)
def test_mesh_axes(sizes, shape):
    mesh = sharding.make_mesh(*sizes)
    assert tuple(mesh.shape[axis] for axis in ("data", "fsdp", "tensor")) == shape
    assert sharding.batch_parts(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((9, 1, 1), "data=9, fsdp=1, tensor=1: it has 9 devices, there are 8"),
        ((-1, 3, 1), "8 devices are not a multiple of 3"),
        ((-1, -1, 1), "-1 for one that takes the rest"),
        ((0, 1, 1), "choose at least 1 of each axis"),
    ],
)
def test_meshes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(*sizes)


@pytest.mark.parametrize("process", ["auto-", "localhost:1,2", "localhost:1,two,0"])
def test_what_names_no_process(process):
    with pytest.raises(ValueError, match=f"distributed='{process}': write 'auto' .* or HOST:PORT,PROCESSES,NUMBER"):
        sharding.join(process)


@pytest.mark.parametrize("kind", [CLIPTextModel, UNet2DConditionModel, AutoencoderKL])
def test_rules_divide_published_models(kind):
    """At full size: but for those with 3 or 4 channels, every matrix is divided; few numbers are not."""
    mesh = sharding.make_mesh(2, 2, 2)
    _, tree = split(nnx.eval_shape(lambda: kind(kind.Config(), rngs=one_key())))
    shardings = sharding.by_rules(tree, mesh)
    whole = sum(
        x.size
        for x, s in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings))
        if math.prod(s.shard_shape(x.shape)) * 4 > x.size
    )
    assert whole < 0.01 * sum(x.size for x in jax.tree.leaves(tree))


def test_rules_that_fit_nothing_and_weights_that_none_fits():
    mesh, tree = sharding.make_mesh(4, 2, 1), {"fc1": {"kernel": np.zeros((4, 6))}, "norm": {"scale": np.zeros(4)}}
    placed = sharding.by_rules(tree, mesh, ((r"fc1\.kernel", ("fsdp", "tensor")), ("", ())))
    assert placed["fc1"]["kernel"].shard_shape((4, 6)) == (2, 6) and placed["norm"]["scale"].shard_shape((4,)) == (4,)
    with pytest.raises(ValueError, match="pattern 'fc3' fits no weight(.|\n)*no pattern fits norm.scale"):
        sharding.by_rules(tree, mesh, (("fc1", ("fsdp",)), ("fc3", ())))


def compiled_step(mesh, **settings):
    """The embedded world's step for a mesh and settings of the config: compiled, its state and frozen, and the plan."""
    config = tiny.get_config()
    config.data.cache = False
    config.update(mesh=dict(mesh.shape), **settings)
    sd, value_encoder = restore.load_models(config, mesh)
    networks, trained, params = split_models(sd, value_encoder, with_vae=True)
    tx = optax.sgd(1.0)
    state = {"step": np.int32(0), "params": trained}
    state = jax.jit(lambda s: s | {"opt_state": tx.init(s["params"])})(state)
    state = jax.device_put(state, sharding.by_rules(state, mesh))
    step = make_train_step(networks, tx, config, make_loss(networks, config))
    batch = plan.abstract_batch(sd, config, 8)
    # In the order that needs the least memory, as accelerators run it; the CPU's own favours concurrency.
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED", "xla_backend_optimization_level": 0}
    compiled = jit_step(step, state, params, mesh).lower(state, params, batch).compile(options)
    return compiled, state, params, plan.traffic(sd, state["params"], sharding.RULES, params, mesh, config)


def test_data_parallel_steps_send_gradients_alone(root):
    """One sum over the devices: each trained array, and the seven scalars of the metrics."""
    compiled, state, _, planned = compiled_step(sharding.make_mesh(8), model=str(root / "model"), random_weights=True)
    ((kind, sizes, among),) = collectives(compiled)
    trained = [
        x.nbytes for name, part in state["params"].items() if name != "embeddings" for x in jax.tree.leaves(part)
    ]
    assert (kind, among) == ("all-reduce", 8) and sorted(sizes) == sorted(trained + [4] * 7)
    assert planned == {"gradient": SENT[kind](8, sum(trained))}


slow = pytest.mark.slow  # half a minute each
SHARDED = [pytest.param((4, 2, 1), False, marks=slow), pytest.param((1, 8, 1), True, marks=slow), ((2, 2, 2), True)]


@pytest.mark.parametrize("shape, shard_frozen", SHARDED)
def test_sharded_steps_send_what_the_plan_says(root, shape, shard_frozen):
    """But for rounding: scalars, norms. The CPU's compiler sums gradients whole where others leave each its part."""
    settings = dict(model=str(root / "model"), random_weights=True, shard_frozen=shard_frozen)
    compiled, _, _, planned = compiled_step(sharding.make_mesh(*shape), **settings)
    sent = sum(SENT[kind](among, sum(sizes)) for kind, sizes, among in collectives(compiled))
    least = sum(planned.values())
    assert 0.95 * least <= sent <= 1.05 * (least + planned["gradient"])


def test_fsdp_gathers_no_whole_model():
    """What sharded weights cost beside replicated ones while the step runs is less than the UNet; at rest an eighth.

    A step from the cache: of the frozen models it holds the UNet.
    """
    settings = dict(train=dict(remat="full"), data=dict(cache=True))
    unsharded, _, frozen, _ = compiled_step(sharding.make_mesh(1), **settings)
    sharded, *_ = compiled_step(sharding.make_mesh(1, 8, 1), shard_frozen=True, **settings)
    unet = sum(x.nbytes for x in jax.tree.leaves(frozen["unet"]))
    memory, at_rest = (
        [getattr(c.memory_analysis(), name) for c in (unsharded, sharded)]
        for name in ("temp_size_in_bytes", "argument_size_in_bytes")
    )
    assert memory[1] - memory[0] / 8 < unet
    assert at_rest[1] < at_rest[0] / 4
    largest = max(x.nbytes for x in jax.tree.leaves(frozen))
    gathered = [size for kind, sizes, _ in collectives(sharded) if kind == "all-gather" for size in sizes]
    assert max(gathered) <= largest and sum(gathered) > unet
