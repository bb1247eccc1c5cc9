"""Layers whose weights are of 8 bits, for models that are frozen."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from livo_jax.models.weights import replaced

DTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


class Quantised(nnx.Module):
    """A linear layer or a convolution, in its place: a weight of 8 bits, and a scale of each of its output channels.

    The weight is made whole as the layer computes, and again in the backward pass, which is left that of 8 bits alone.
    """

    def __init__(self, layer: nnx.Linear | nnx.Conv, kernel: jax.Array, scale: jax.Array):
        self.kernel, self.kernel_scale = nnx.Param(kernel), nnx.Param(scale)
        self.bias, self.dtype = layer.bias, layer.kernel.dtype
        bare = nnx.merge(*nnx.split(layer))
        bare.bias, bare.use_bias = None, False
        self.graph = nnx.graphdef(bare)

    def __call__(self, x):
        given = jax.ShapeDtypeStruct(x.shape, x.dtype)

        # A rule of its own: what jax.checkpoint forgets, another one around it may keep.
        @jax.custom_vjp
        def multiply(kernel, scale, x):
            return nnx.merge(self.graph, {"kernel": _whole(kernel, scale, self.dtype)})(x)

        def forward(kernel, scale, x):
            return multiply(kernel, scale, x), (kernel, scale)

        def backward(stored, y):
            stored, y = jax.lax.optimization_barrier((stored, y))  # or a compiler would keep the forward pass's weight
            (x,) = jax.linear_transpose(lambda x: multiply.fun(*stored, x), given)(y)
            return None, None, x

        multiply.defvjp(forward, backward)
        y = multiply(self.kernel[...], self.kernel_scale[...], x)
        return y if self.bias is None else y + self.bias[...]

    def restored(self) -> nnx.Linear | nnx.Conv:
        """The layer as it was, but for what 8 bits have lost."""
        layer = nnx.merge(self.graph, {"kernel": weight_of(self)})
        layer.bias, layer.use_bias = self.bias, self.bias is not None
        return layer


def _whole(kernel, scale, dtype):
    return (kernel.astype(jnp.float32) * scale).astype(dtype)


def weight_of(layer) -> jax.Array:
    """The weight of a linear layer or a convolution, whole, in the dtype that it computes in."""
    scale = getattr(layer, "kernel_scale", None)
    if scale is None:
        return layer.kernel[...]
    return _whole(layer.kernel[...], scale[...], layer.dtype)


def quantised(module: nnx.Module, quantise: Callable) -> nnx.Module:
    """A copy of a module whose linear layers and convolutions are Quantised.

    Args:
        quantise: kernel -> its values of 8 bits, and scales that broadcast to it.
    """
    kinds = (nnx.Linear, nnx.Conv)
    return _with_layers(module, kinds, lambda layer: Quantised(layer, *quantise(layer.kernel.get_value())))


def whole(module: nnx.Module) -> nnx.Module:
    """A copy of a module whose Quantised layers are restored."""
    return _with_layers(module, (Quantised,), Quantised.restored)


def _with_layers(module, kinds: tuple, make):
    """A copy of a module, which has make(layer) in the place of every layer of these classes."""
    layers = {".".join(map(str, path)): layer for path, layer in nnx.iter_modules(module) if type(layer) in kinds}
    return replaced(module, lambda layer, _: make(layer), layers)
