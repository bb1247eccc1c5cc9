"""Low-rank updates (LoRA, Hu et al. 2022) of the linear layers of any module."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from livo_jax.models.quantised import weight_of, whole
from livo_jax.models.weights import name_of, replaced, split


class Updated(nnx.Module):
    """A linear layer with an update beside its weight, y = x W + b + scale (x A) B, in the place of the layer.

    Summed in float32 and rounded once, to the dtype of x W: in the weight itself, rounded to half precision, the update
    of a training step would vanish.
    """

    def __init__(self, layer: nnx.Linear, update: nnx.Dict, scale: float):
        self.kernel, self.bias, self.dtype = layer.kernel, layer.bias, layer.dtype
        self.kernel_scale = getattr(layer, "kernel_scale", None)  # of one that is quantised
        self.lora_A, self.lora_B, self.scale = update.lora_A, update.lora_B, scale

    def __call__(self, x):
        kernel = weight_of(self)
        y = jnp.matmul(x, kernel, preferred_element_type=jnp.float32)
        if self.bias is not None:
            y += self.bias[...].astype(jnp.float32)
        y += self.scale * self.lora_B(self.lora_A(x.astype(jnp.float32)))
        return y.astype(jnp.result_type(x, kernel))


def updates(module, targets, rank: int, rngs) -> nnx.Dict:
    """Untrained updates of kernels of a module, which may be abstract: of layers whose names end as one of `targets`.

    Returns:
        By the path of the layer lora_A and lora_B, linear layers of `rank` between. As peft starts: A is small, B
        zero, so that they change nothing.
    """
    found, ends = nnx.Dict(), tuple(f".{target}" for target in targets)
    small, zero = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), nnx.initializers.zeros
    linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
    for (*layer, leaf), weight in jax.tree_util.tree_leaves_with_path(split(module)[1]):
        name = name_of(layer)
        if leaf.key == "kernel" and name.endswith(ends):
            rows, columns = weight.shape
            found[name] = nnx.Dict(
                lora_A=linear(rows, rank, kernel_init=small), lora_B=linear(rank, columns, kernel_init=zero)
            )
    return found


def updated(module, updates, scale: float):
    """A copy of a module, with its updates beside the weights; these stay as they are."""
    return replaced(module, lambda layer, update: Updated(layer, update, scale), updates)


def merged(module, updates, scale: float):
    """The module with weights W + scale A B where there is an update, all of float32: to be saved."""
    graph, params = split(whole(module))

    def update(path, weight):
        *layer, leaf = path
        name, weight = name_of(layer), weight.astype(jnp.float32)
        if leaf.key != "kernel" or name not in updates:
            return weight
        A, B = (updates[name][part].kernel[...] for part in ("lora_A", "lora_B"))
        return weight + scale * jnp.matmul(A, B, precision="highest")

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(update, params))
