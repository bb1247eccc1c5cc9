"""The Inception v3 (Szegedy et al. 2016) of FID, as torch-fidelity computes it.

It is TensorFlow's network of 2015-12-05 and not torchvision's: an average at an edge leaves the padding out, the last
block takes a maximum in the place of an average, and images are resized as TensorFlow 1 did.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

SIZE = 299  # height and width to which images are resized
CLASSES = 1008

# The blocks: name -> how its input is pooled, strides, and its branches: chains of convolutions (width, height and
# width of the kernel), whose outputs are concatenated. Two convolutions in one place stand side by side.
# "branch_pool" begins with the pooled input. The last convolution of a chain has the block's strides.


def _a(pool_width):
    chain = [(64, 1, 1), (96, 3, 3), (96, 3, 3)]
    branches = {"branch1x1": [(64, 1, 1)], "branch5x5": [(48, 1, 1), (64, 5, 5)], "branch3x3dbl": chain}
    return "average", 1, branches | {"branch_pool": [(pool_width, 1, 1)]}


def _c(width):
    down, across = (width, 7, 1), (width, 1, 7)
    branches = {
        "branch1x1": [(192, 1, 1)],
        "branch7x7": [(width, 1, 1), across, (192, 7, 1)],
        "branch7x7dbl": [(width, 1, 1), down, across, down, (192, 1, 7)],
    }
    return "average", 1, branches | {"branch_pool": [(192, 1, 1)]}


def _e(pool):
    both = [(384, 1, 3), (384, 3, 1)]
    branches = {
        "branch1x1": [(320, 1, 1)],
        "branch3x3": [(384, 1, 1), both],
        "branch3x3dbl": [(448, 1, 1), (384, 3, 3), both],
    }
    return pool, 1, branches | {"branch_pool": [(192, 1, 1)]}


_B = {"branch3x3": [(384, 3, 3)], "branch3x3dbl": [(64, 1, 1), (96, 3, 3), (96, 3, 3)], "branch_pool": []}
_D = {
    "branch3x3": [(192, 1, 1), (320, 3, 3)],
    "branch7x7x3": [(192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3)],
    "branch_pool": [],
}
BLOCKS = {
    "Mixed_5b": _a(32), "Mixed_5c": _a(64), "Mixed_5d": _a(64), "Mixed_6a": ("max", 2, _B),
    "Mixed_6b": _c(128), "Mixed_6c": _c(160), "Mixed_6d": _c(160), "Mixed_6e": _c(192), "Mixed_7a": ("max", 2, _D),
    "Mixed_7b": _e("average"), "Mixed_7c": _e("max"),
}  # fmt: skip


class InceptionOutput(NamedTuple):
    features: jax.Array  # [B, 2048] float32, of FID and KID
    logits: jax.Array  # [B, 1008] float32, without the bias, of the Inception Score


class BatchNorm(nnx.Module):
    """Batch normalisation by the statistics of the training."""

    def __init__(self, channels: int):
        self.scale, self.running_var = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.ones(channels))
        self.bias, self.running_mean = nnx.Param(jnp.zeros(channels)), nnx.Param(jnp.zeros(channels))

    def __call__(self, x):
        factor = self.scale[...] * jax.lax.rsqrt(self.running_var[...] + 1e-3)
        return (x - self.running_mean[...]) * factor + self.bias[...]


class BasicConv2d(nnx.Module):
    def __init__(self, in_channels, channels, kernel, strides=1, padding="VALID", *, rngs):
        self.conv = nnx.Conv(in_channels, channels, kernel, strides, padding=padding, use_bias=False, rngs=rngs)
        self.bn = BatchNorm(channels)

    def __call__(self, x):
        return jax.nn.relu(self.bn(self.conv(x)))


class Mixed(nnx.Module):
    """A block of BLOCKS; its convolutions bear their published names, as branch3x3dbl_3a."""

    def __init__(self, in_channels: int, pool: str, strides: int, branches: dict, *, rngs):
        self.pool, self.strides = pool, strides
        self.padding = "SAME" if strides == 1 else "VALID"
        self.chains = {}  # branch -> its places, each the names of the convolutions there
        self.channels = 0
        for branch, chain in branches.items():
            width, places = in_channels, []
            for i, place in enumerate(chain, 1):
                name = branch if len(chain) == 1 else f"{branch}_{i}"
                convolutions = dict(zip("ab", place)) if isinstance(place, list) else {"": place}
                last = i == len(chain)
                for letter, (channels, *kernel) in convolutions.items():
                    conv = BasicConv2d(
                        width, channels, kernel, strides if last else 1, self.padding if last else "SAME", rngs=rngs
                    )
                    setattr(self, name + letter, conv)
                places.append([name + letter for letter in convolutions])
                width = sum(channels for channels, *_ in convolutions.values())
            self.chains[branch] = places
            self.channels += width

    def __call__(self, x):
        window, strides = (3, 3), (self.strides,) * 2
        if self.pool == "max":
            pooled = nnx.max_pool(x, window, strides, self.padding)
        else:
            pooled = nnx.avg_pool(x, window, strides, self.padding, count_include_pad=False)
        outputs = []
        for branch, places in self.chains.items():
            h = pooled if branch == "branch_pool" else x
            for names in places:
                h = jnp.concatenate([getattr(self, name)(h) for name in names], -1)
            outputs.append(h)
        return jnp.concatenate(outputs, -1)


class InceptionV3(nnx.Module):
    """Attribute paths are the names in torch-fidelity's weights-inception-2015-12-05-6726825d.pth."""

    def __init__(self, *, rngs):
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, (3, 3), 2, rngs=rngs)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, (3, 3), rngs=rngs)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, (3, 3), padding="SAME", rngs=rngs)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, (1, 1), rngs=rngs)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, (3, 3), rngs=rngs)
        channels = 192
        for name, block in BLOCKS.items():
            mixed = Mixed(channels, *block, rngs=rngs)
            setattr(self, name, mixed)
            channels = mixed.channels
        self.fc = nnx.Linear(channels, CLASSES, rngs=rngs)

    def __call__(self, images) -> InceptionOutput:
        """Features of images [B, H, W, 3] uint8, of any size."""
        x = (resize(images.astype(jnp.float32), SIZE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = nnx.max_pool(x, (3, 3), (2, 2))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = nnx.max_pool(x, (3, 3), (2, 2))
        for name in BLOCKS:
            x = getattr(self, name)(x)
        features = x.mean((1, 2))
        return InceptionOutput(features, features @ self.fc.kernel[...])


def resize(x, size: int):
    """Bilinear resizing as TensorFlow 1 did it, its corners not aligned, and without a filter.

    Args:
        x: [B, H, W, C] float32.

    Returns:
        [B, size, size, C].
    """

    def along(x, axis):
        n = x.shape[axis]
        at = jnp.arange(size, dtype=jnp.float32) * jnp.float32(n / size)
        low = at.astype(jnp.int32)
        a, b = (jnp.take(x, i, axis) for i in (low, jnp.minimum(low + 1, n - 1)))
        return a + (b - a) * jnp.expand_dims(at - low, [i for i in range(x.ndim) if i != axis])

    return along(along(x, 2), 1)
