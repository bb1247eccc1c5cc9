"""Low-rank updates (LoRA, Hu et al. 2022) of the kernels of any module."""

import jax
import jax.numpy as jnp
from flax import nnx

from livo_jax.models.weights import split


def updates(module, targets, rank: int, rngs) -> nnx.Dict:
    """Untrained updates of kernels of a module, which may be abstract: of layers whose names end as one of `targets`.

    Returns:
        By the path of the layer lora_A and lora_B, linear layers of `rank` between. As peft starts: A is small, B
        zero, so that they change nothing.
    """
    found, ends = nnx.Dict(), tuple(f".{target}" for target in targets)
    small, zero = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), nnx.initializers.zeros
    linear = lambda rows, columns, init: nnx.Linear(rows, columns, use_bias=False, kernel_init=init, rngs=rngs)
    for (*layer, leaf), weight in jax.tree_util.tree_leaves_with_path(split(module)[1]):
        name = jax.tree_util.keystr(layer, simple=True, separator=".")
        if leaf.key == "kernel" and name.endswith(ends):
            rows, columns = weight.shape
            found[name] = nnx.Dict(lora_A=linear(rows, rank, small), lora_B=linear(rank, columns, zero))
    return found


def merged(module, updates, scale: float):
    """The module with weights W + scale A B where there is an update, all of float32."""
    graph, params = split(module)

    def update(path, weight):
        *layer, leaf = path
        name, weight = jax.tree_util.keystr(layer, simple=True, separator="."), weight.astype(jnp.float32)
        if leaf.key != "kernel" or name not in updates:
            return weight
        A, B = (updates[name][part].kernel[...] for part in ("lora_A", "lora_B"))
        return weight + scale * jnp.matmul(A, B, precision="highest")

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(update, params))
