"""The device mesh, and where arrays lie on it.

A batch is divided over the axes "data" and "fsdp". Weights that are sharded are divided over "fsdp", and where a
layer can compute with its part alone (Shoeybi et al. 2019) over "tensor" too: the devices of that axis share rows.
"""

import hashlib
import math
import re
import sys
import weakref

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from livo_jax.models.weights import name_of, put, split

AXES = ("data", "fsdp", "tensor")

# How sharded weights, and the optimizer's moments of them, are divided: the first pattern that is found in a name
# gives the axes of its last dimensions. An axis that does not divide its dimension is left out. Before a layer
# computes, it gathers what lies on "fsdp".
BOTH = ("fsdp", "tensor")
RULES = (
    # Heads, and what widens: by columns. Of T5 they are q, k, v and wi.
    (r"(to_[qkv]|[qkv]_proj|fc1|net\.0\.proj|Attention\.[qkv]|wi_[01])\.kernel$", ("fsdp", "tensor")),
    (r"(to_out\.0|to_add_out|out_proj|fc2|net\.2|Attention\.o|wo)\.kernel$", ("tensor", "fsdp")),  # by rows
    (r"(kernel|embedding)$", (BOTH,)),  # convolutions and the rest
    (r"", ()),  # norms, biases, scalars: whole
)


WHOLE = ((r"", ()),)  # rules for what is small: every device holds all of it


def join(process: str = "auto"):
    """Joins the processes of a run, before anything else touches a device.

    A process that dies ends the others: within the half minute in which it gives no sign of life, or as soon as
    they miss it.

    Args:
        process: "auto" where the cluster tells (TPU pods, SLURM); else "HOST:PORT,PROCESSES,NUMBER", HOST:PORT
            being a free one on the machine of process 0.

    Raises:
        ValueError: neither of these.
    """
    cluster = {}
    try:
        if process != "auto":
            address, count, number = process.split(",")
            cluster = dict(coordinator_address=address, num_processes=int(count), process_id=int(number))
            # JAX waits without a word, and then aborts.
            print(f"process {number} of {count}: waits up to 5 minutes for the others at {address}", file=sys.stderr)
        jax.distributed.initialize(**cluster, heartbeat_timeout_seconds=30)
    except ValueError as error:
        raise ValueError(
            f"distributed={process!r}: write 'auto' on a cluster that JAX knows (TPU pods, SLURM, ...), or"
            f" HOST:PORT,PROCESSES,NUMBER with a number from 0 to PROCESSES - 1: {error}"
        ) from error


def mesh_shape(devices: int, data: int = -1, fsdp: int = 1, tensor: int = 1) -> tuple[int, int, int]:
    """The sizes of the mesh's axes on so many devices; -1 is what the others leave, for one of them.

    Raises:
        ValueError: more devices are asked for than there are, or no whole number is left.
    """
    sizes = dict(zip(AXES, (data, fsdp, tensor)))
    asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh {asked}: choose at least 1 of each axis, -1 for one that takes the rest")
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    for axis in open_axes:
        if devices % fixed:
            raise ValueError(f"mesh {asked}: {devices} devices are not a multiple of {fixed}")
        sizes[axis] = devices // fixed
    if (size := int(np.prod(list(sizes.values())))) > devices:
        raise ValueError(f"mesh {asked}: it has {size} devices, there are {devices}")
    return tuple(sizes.values())


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over the first devices of all processes, with as many of them on each axis; -1 takes the rest.

    Raises:
        ValueError: as mesh_shape; one that leaves devices of a process out, or has rows cross processes.
    """
    devices = jax.devices()
    shape = mesh_shape(len(devices), data, fsdp, tensor)
    size, local = int(np.prod(shape)), jax.local_device_count()
    if jax.process_count() > 1 and (size < len(devices) or local % shape[2]):
        raise ValueError(
            f"mesh of {' x '.join(map(str, shape))} devices: {jax.process_count()} processes with {local} each want all"
            f" {len(devices)} in it, and tensor to divide {local}"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:size])


def make_local_mesh() -> Mesh:
    """A mesh over this process's own devices, for work that needs no other process."""
    devices = jax.local_devices()
    return jax.make_mesh((len(devices), 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


# ---------------------------------------------------------------------------- where arrays lie


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The first dimension is divided over the mesh: batches."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def batch_parts(mesh: Mesh) -> int:
    """In how many parts over_batch divides a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def home_of(module) -> Mesh:
    """The mesh that a module's weights are divided over, or else all devices."""
    divided = (x.sharding.mesh for x in jax.tree.leaves(split(module)[1]) if not x.is_fully_replicated)
    return next(divided, None) or make_mesh()


def part_of(home: Mesh, images: int) -> Mesh:
    """The mesh, or of one on which each device has all weights as many of its devices as there are images."""
    few = images < home.shape["data"] == home.size and jax.process_count() == 1
    return make_mesh(data=images) if few else home


def settle(module, home: Mesh):
    """Copies weights that some device of home lacks to each of its devices, where the module keeps them."""
    _, params = split(module)
    if not all(x.sharding.device_set >= set(home.devices.flat) for x in jax.tree.leaves(params)):
        nnx.update(module, on_mesh(params, home))


def on_mesh(params: dict, mesh: Mesh) -> dict:
    """Weights that lie on the mesh as they are, others on each of its devices: without a copy where they lie there."""

    def put_there(x):
        return x if getattr(x.sharding, "mesh", None) == mesh else jax.device_put(x, replicated(mesh))

    return jax.tree.map(put_there, params)


def replicate(module: nnx.Module, mesh: Mesh) -> nnx.Module:
    """The module with all of its weights, which every process has whole, on each device of the mesh."""
    graph, params = split(module)
    return nnx.merge(graph, jax.tree.map(lambda x: put(np.asarray(x), replicated(mesh)), params))


def rule(path, rules=RULES) -> tuple[str | None, tuple]:
    """The first rule (pattern, axes) that fits the key path of a leaf; pattern None if none does."""
    name = name_of(path)
    return next((rule for rule in rules if re.search(rule[0], name)), (None, ()))


def _weight(path, shape, mesh, rules, gathered: bool) -> tuple[str | None, NamedSharding]:
    """The pattern that a weight follows, and where that puts it; `gathered`: when its layer computes."""
    pattern, axes = rule(path, rules)
    axes = (None,) * (len(shape) - len(axes)) + tuple(axes)
    axes = [None if gathered and "fsdp" in (axis or ()) else axis for axis in axes]

    def divides(axis, size: int) -> bool:
        names = (axis,) if isinstance(axis, str) else axis
        return size % math.prod(mesh.shape[name] for name in names) == 0

    spec = [axis if axis and divides(axis, size) else None for axis, size in zip(axes, shape)]
    return pattern, NamedSharding(mesh, PartitionSpec(*spec))


def by_rules(tree, mesh: Mesh, rules=RULES, gathered: bool = False):
    """The sharding of each leaf of a tree of weights (arrays, or what has their shape) by partition rules.

    Args:
        rules: (pattern, axes of the last dimensions), the first pattern found in a leaf's name counts; see RULES.
        gathered: while a layer computes with them, not at rest.

    Raises:
        ValueError: leaves that no pattern fits, or patterns that fit no leaf; all are listed.
    """
    used, homeless = set(), []

    def place(path, leaf):
        pattern, sharding = _weight(path, leaf.shape, mesh, rules, gathered)
        used.add(pattern)
        if pattern is None:
            homeless.append(name_of(path))
        return sharding

    shardings = jax.tree_util.tree_map_with_path(place, tree)
    problems = [f"the pattern {pattern!r} fits no weight" for pattern, _ in rules if pattern not in used]
    problems += [f"no pattern fits {name}" for name in homeless]
    if problems:
        raise ValueError("partition rules:\n  " + "\n  ".join(problems))
    return shardings


def gather(x, params, mesh: Mesh, rules=RULES):
    """A layer's input and weights as it computes with them: divided by rows alone, and whole along "fsdp". Under jit.

    Without it the compiler may move rows to the weights' parts: traffic that grows with the batch.
    """
    rows = NamedSharding(mesh, PartitionSpec(PartitionSpec.UNCONSTRAINED, *[None] * (x.ndim - 1)))

    def place(path, leaf):
        return _weight(path, leaf.shape, mesh, rules, gathered=True)[1]

    return jax.lax.with_sharding_constraint((x, params), (rows, jax.tree_util.tree_map_with_path(place, params)))


def check_batch_size(mesh: Mesh, batch_size: int, name: str):
    """Raises ValueError unless the mesh divides a global batch."""
    parts = batch_parts(mesh)
    if batch_size < 1:
        raise ValueError(f"{name}={batch_size}: choose at least 1")
    if batch_size % parts:
        below = batch_size // parts * parts
        choices = " or ".join(str(size) for size in (below, below + parts) if size)
        raise ValueError(
            f"{name}={batch_size} is not a multiple of the mesh's {parts} parts (data times fsdp): choose {choices}"
        )


def global_batch(mesh: Mesh, local: dict) -> dict:
    """Assembles this process's rows into global arrays that are divided over the mesh."""
    return jax.make_array_from_process_local_data(over_batch(mesh), local)


def fetch(array) -> np.ndarray:
    """The whole of an array, in every process that holds a part of it."""
    return np.asarray(array) if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True)


_digests = {}  # id of a jax.Array that is alive -> a weak reference to it, and its digest


def digest(tree) -> str:
    """Of a tree of arrays: the same where they are. A jax.Array, which cannot change, is fetched and hashed once."""
    return hashlib.sha256("".join(map(_digest_of, jax.tree.leaves(tree))).encode()).hexdigest()


def _digest_of(leaf) -> str:
    key = id(leaf)
    alive, known = _digests.get(key, (None, None))
    if alive and alive() is leaf:
        return known
    array = np.ascontiguousarray(fetch(leaf) if isinstance(leaf, jax.Array) else leaf)
    found = hashlib.sha256(f"{array.shape} {array.dtype}".encode() + array.tobytes()).hexdigest()
    if isinstance(leaf, jax.Array):
        _digests[key] = weakref.ref(leaf, lambda _: _digests.pop(key, None)), found
    return found
