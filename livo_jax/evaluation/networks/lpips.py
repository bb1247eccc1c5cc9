"""LPIPS (Zhang et al. 2018), version 0.1, on AlexNet: how different two images look."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

LEAST = 31  # pixels of height and width; of less nothing is left after the second pooling
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)  # of colours as -1 to 1, and their scale
SCALE = np.array([0.458, 0.448, 0.450], np.float32)
# AlexNet's convolutions: their number among its layers, which published names bear, width, kernel, strides, padding.
LAYERS = ((0, 64, 11, 4, 2), (3, 192, 5, 1, 2), (6, 384, 3, 1, 1), (8, 256, 3, 1, 1), (10, 256, 3, 1, 1))
POOLED = (1, 2)  # before these of LAYERS stands a pooling


class AlexNet(nnx.Module):
    """The convolutions of AlexNet, [B, H, W, 3] -> their five outputs."""

    def __init__(self, *, rngs):
        channels = 3
        for i, (number, width, kernel, strides, padding) in enumerate(LAYERS):
            conv = nnx.Conv(channels, width, (kernel, kernel), strides, padding=padding, rngs=rngs)
            setattr(self, f"slice{i + 1}", nnx.Dict({str(number): conv}))
            channels = width

    def __call__(self, x):
        outputs = []
        for i, (number, *_) in enumerate(LAYERS):
            x = nnx.max_pool(x, (3, 3), (2, 2)) if i in POOLED else x
            x = jax.nn.relu(getattr(self, f"slice{i + 1}")[str(number)](x))
            outputs.append(x)
        return outputs


class LinLayer(nnx.Module):
    """The weight of each channel; `model.1` is its published place, after a dropout."""

    def __init__(self, channels: int, *, rngs):
        self.model = nnx.Dict({"1": nnx.Conv(channels, 1, (1, 1), use_bias=False, rngs=rngs)})

    def __call__(self, x):
        return self.model["1"](x)


class LPIPS(nnx.Module):
    """Attribute paths are the names in the state dict of lpips.LPIPS(net="alex")."""

    def __init__(self, *, rngs):
        self.net = AlexNet(rngs=rngs)
        for i, (_, width, *_) in enumerate(LAYERS):
            setattr(self, f"lin{i}", LinLayer(width, rngs=rngs))

    def features(self, images) -> list[jax.Array]:
        """Of images [B, H, W, 3] uint8, at least LEAST pixels high and wide, each layer's channels at unit length."""
        outputs = self.net((images.astype(jnp.float32) / 127.5 - 1 - SHIFT) / SCALE)
        return [x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-10) for x in outputs]

    def weigh(self, squares: list[jax.Array]) -> jax.Array:
        """The distances [B] of which these are the squared differences of the features, [B, h, w, C] of each layer."""
        return sum(getattr(self, f"lin{i}")(x).mean((1, 2, 3)) for i, x in enumerate(squares))

    def __call__(self, a, b) -> jax.Array:
        """The distances [B] of images a and b, [B, H, W, 3] uint8."""
        return self.weigh([(x - y) ** 2 for x, y in zip(self.features(a), self.features(b))])

    def diversity(self, images) -> jax.Array:
        """The mean distance of all pairs of images [N, H, W, 3] uint8, N at least 2.

        The mean of (x - y)^2 over pairs is twice the variance, so that no pair has to be looked at.
        """
        return self.weigh([2 * jnp.var(x, axis=0, ddof=1, keepdims=True) for x in self.features(images)])[0]
