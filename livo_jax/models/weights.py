"""Published state dicts <-> parameter trees.

Our attribute paths are the published names, so that one rule converts every model, both ways:

    published                                ours
    ...conv1.weight   [O, I, kH, kW]         ...conv1.kernel   [kH, kW, I, O]
    ...to_q.weight    [O, I]                 ...to_q.kernel    [I, O]
    ...norm1.weight   [C]                    ...norm1.scale    [C]
    ...token_embedding.weight [V, D]         ...token_embedding.embedding [V, D]
    ...bias           [C]                    ...bias           [C]
"""

import functools
import math
import re
import types
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

# What published files hold beside or instead of today's names.
LEGACY = (
    (re.compile(r"^text_model\."), ""),  # transformers before 5; our exporter writes it for them
    (re.compile(r"(mid_block\.attentions\.\d+)\.query\."), r"\1.to_q."),  # VAEs before diffusers 0.18
    (re.compile(r"(mid_block\.attentions\.\d+)\.key\."), r"\1.to_k."),
    (re.compile(r"(mid_block\.attentions\.\d+)\.value\."), r"\1.to_v."),
    (re.compile(r"(mid_block\.attentions\.\d+)\.proj_attn\."), r"\1.to_out.0."),
)
# Saved beside the weights, but constants: by transformers before 4.31, by PyTorch's batch norms, by lpips. And the
# projection of a text transformer, which one that only encodes has no use for, and a second copy of T5's embeddings.
BESIDE = re.compile(
    r"(^|\.)(position_ids|num_batches_tracked)$|^scaling_layer\.|^text_projection\.weight$|^encoder\.embed_tokens\.weight$"
)

TO_OURS = {4: (2, 3, 1, 0), 2: (1, 0)}  # of a published `weight` that becomes a `kernel`, by rank
TO_PUBLISHED = {4: (3, 2, 0, 1), 2: (1, 0)}


def split(module: nnx.Module) -> tuple[nnx.GraphDef, dict]:
    """A module as its static structure and its parameters, a nested dict of arrays; nnx.merge undoes it."""
    graph, state = nnx.split(module)
    return graph, nnx.to_pure_dict(state)


def name_of(path) -> str:
    """The name of a key path in a tree, "down_blocks.0.attentions.0"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


@functools.partial(jax.jit, static_argnames=("graph", "method"))
def apply(graph: nnx.GraphDef, params, *args, method: str = "__call__"):
    """What a method of a module that was split returns.

    Under jit of its own, in programs too: of equal structures and shapes it is traced once, however often they call it.
    """
    return getattr(nnx.merge(graph, params), method)(*args)


def replaced(module, make, updates):
    """A copy of a module, which has make(layer, update) in the place of every layer that `updates` names."""
    module = nnx.merge(*split(module))
    for name, update in updates.items():
        *path, last = name.split(".")
        parent = module
        for part in path:
            parent = _child(parent, part)
        new = make(_child(parent, last), update)
        if last.isdigit():
            parent[int(last)] = new
        else:
            setattr(parent, last, new)
    return module


def _child(module, name: str):
    return module[int(name)] if name.isdigit() else getattr(module, name)


def count(params) -> int:
    """How many numbers a tree of arrays, or of shapes, has."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def one_key() -> types.SimpleNamespace:
    """In the place of nnx.Rngs, where only shapes matter: the same key for every parameter.

    nnx.Rngs counts its keys; a count in a trace costs time in proportion to all before it, for an XL minutes in sum.
    """
    key = jax.random.key(0)
    return types.SimpleNamespace(params=lambda: key)


def published_name(path) -> str:
    """`down_blocks.0.resnets.0.conv1.weight` for the key path of a leaf, as jax.tree_util gives it."""
    name = name_of(path)
    return re.sub(r"\.(kernel|scale|embedding)$", ".weight", name)


def from_published(tensors: Mapping, abstract: dict, dtype=None, sharding=None) -> dict:
    """Fills a parameter tree from a published state dict.

    Args:
        tensors: published name -> array, or what has a shape and becomes an array by np.asarray. Each
            is read once, and after all names and shapes are checked.
        abstract: nested dict of jax.ShapeDtypeStruct: the tree to fill.
        dtype: dtype of the result; that of `abstract` if None.
        sharding: a jax.sharding.Sharding of the result, or a function that makes a tree of them of `abstract`;
            the default device if None. The host holds one array at a time.

    Returns:
        The tree, of jax.Arrays.

    Raises:
        ValueError: names are missing, unexpected or misshapen, and all of them are listed; or a weight is too large for
            the dtype.
    """
    leaves = {published_name(path): (path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    theirs = {}
    for name in tensors:
        ours = name
        for pattern, replacement in LEGACY if name not in leaves else ():  # a whole CLIP has its text_model.
            ours = pattern.sub(replacement, ours)
        if ours in leaves or not BESIDE.search(ours):
            theirs[ours] = name
    problems = []
    for name, (path, leaf) in leaves.items():
        if name not in theirs:
            problems.append(f"missing {name} {leaf.shape}")
        elif (shape := _shape_in_ours(path, tensors[theirs[name]].shape)) != leaf.shape:
            problems.append(f"misshapen {name}: {shape} in our layout, {leaf.shape} wanted")
    problems += [f"unexpected {theirs[name]}" for name in theirs if name not in leaves]
    if problems:
        raise ValueError(f"{len(problems)} weights do not fit the model:\n  " + "\n  ".join(problems))

    def fill(path, leaf, sharding):
        array = np.asarray(tensors[theirs[published_name(path)]])
        if path[-1].key == "kernel":
            array = array.transpose(TO_OURS[array.ndim])
        with np.errstate(over="ignore"):
            array = array.astype(dtype or leaf.dtype)
        if array.dtype == np.float16 and not np.isfinite(array).all():
            raise ValueError(f"{published_name(path)} is too large for float16: load it in bfloat16 or float32")
        return put(array, sharding)

    return jax.tree_util.tree_map_with_path(fill, abstract, for_each_leaf(sharding, abstract))


def for_each_leaf(sharding, tree):
    """What `sharding` (a Sharding or None, or a function of the tree) says of each leaf."""
    return sharding(tree) if callable(sharding) else jax.tree.map(lambda _: sharding, tree)


def put(array: np.ndarray, sharding=None) -> jax.Array:
    """An array that every process has whole, where `sharding` wants it: no process waits for another."""
    if sharding is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _shape_in_ours(path, shape) -> tuple:
    order = TO_OURS.get(len(shape)) if path[-1].key == "kernel" else None
    return tuple(shape[i] for i in order) if order else tuple(shape)


def to_published(params: dict, prefix: str = "") -> dict[str, np.ndarray]:
    """The published state dict of a parameter tree; `prefix` ("text_model.") goes before every name."""
    published = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        if path[-1].key == "kernel":
            array = array.transpose(TO_PUBLISHED[array.ndim])
        published[prefix + published_name(path)] = np.asarray(array, order="C")
    return published
