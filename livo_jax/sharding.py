"""The device mesh, and where arrays lie on it."""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def join(process: str = "auto"):
    """Joins the processes of a run, before anything else touches a device.

    Args:
        process: "auto" where the cluster tells (TPU pods, SLURM); else "HOST:PORT,PROCESSES,NUMBER", HOST:PORT
            being a free one on the machine of process 0.

    Raises:
        ValueError: neither of these.
    """
    if process == "auto":
        jax.distributed.initialize()
        return
    try:
        address, count, number = process.split(",")
        count, number = int(count), int(number)
    except ValueError as error:
        raise ValueError(f"distributed={process!r}: write 'auto' or HOST:PORT,PROCESSES,NUMBER") from error
    jax.distributed.initialize(address, count, number)


def make_local_mesh() -> Mesh:
    """A mesh over this process's own devices, for work that needs no other process."""
    devices = jax.local_devices()
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def make_mesh(data: int = -1) -> Mesh:
    """A mesh over devices with the axis "data"; -1 takes every device there is.

    Raises:
        ValueError: more devices are asked for than there are.
    """
    devices = jax.devices()
    size = len(devices) if data == -1 else data
    if not 1 <= size <= len(devices):
        raise ValueError(f"mesh data={data}: there are {len(devices)} devices ({devices[0].device_kind})")
    return jax.make_mesh((size,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:size])


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array: parameters, optimizer state, scalars."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The first dimension is divided over the mesh: batches."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch_size(mesh: Mesh, batch_size: int, name: str):
    """Raises ValueError unless the mesh and the processes divide a global batch."""
    if batch_size < 1:
        raise ValueError(f"{name}={batch_size}: choose at least 1")
    if batch_size % mesh.shape["data"]:
        below = batch_size // mesh.shape["data"] * mesh.shape["data"]
        raise ValueError(
            f"{name}={batch_size} is not a multiple of the mesh's {mesh.shape['data']} devices:"
            f" choose {below or mesh.shape['data']} or {below + mesh.shape['data']}"
        )


def global_batch(mesh: Mesh, local: dict) -> dict:
    """Assembles this process's rows into global arrays that are divided over the mesh."""
    return jax.make_array_from_process_local_data(over_batch(mesh), local)


def fetch(array) -> np.ndarray:
    """The whole of an array, in every process that holds a part of it."""
    return np.asarray(array) if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True)
