"""Modules of published directories: read, made at random, written."""

import functools
import pathlib
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from livo_jax.files.directories import write_json
from livo_jax.files.repositories import (
    open_tensors,
    read_json,
    weight_files,
    write_safetensors,
)
from livo_jax.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from livo_jax.models.mmdit import SD3Transformer2DModel
from livo_jax.models.t5 import T5EncoderModel
from livo_jax.models.unet import UNet2DConditionModel
from livo_jax.models.vae import AutoencoderKL
from livo_jax.models.weights import for_each_leaf, from_published, one_key, published_name, put, split, to_published

# The parts of Stable Diffusions, and what their weight files are called. sampling/families.py says which has which.
PARTS = {
    "text_encoder": (CLIPTextModel, "model"),
    "text_encoder_2": (CLIPTextModelWithProjection, "model"),
    "text_encoder_3": (T5EncoderModel, "model"),
    "unet": (UNet2DConditionModel, "diffusion_pytorch_model"),
    "transformer": (SD3Transformer2DModel, "diffusion_pytorch_model"),
    "vae": (AutoencoderKL, "diffusion_pytorch_model"),
}

# What config.dtype may say.
DTYPES = {
    "float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16,
    "fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16, "half": jnp.float16,
}  # fmt: skip

# The layers of a text encoder, by their published names.
TEXT_LAYER = re.compile(r"^(?:text_model\.)?encoder\.layers\.(\d+)\.")


def read_dtype(dtype, field: str = "dtype") -> np.dtype:
    """The dtype of a model's weights by one of its usual names, or as it is.

    Raises:
        ValueError: models do not compute in it, or not on a CPU; `field` is named.
    """
    known = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if known is None or jnp.dtype(known) not in map(jnp.dtype, DTYPES.values()):
        raise ValueError(f"{field}={dtype!r}: choose float32, bfloat16 or float16 (fp32, bf16, fp16)")
    if jnp.dtype(known) == jnp.float16 and jax.default_backend() == "cpu":
        raise ValueError(f"{field}={dtype!r} wants a GPU or TPU: on a CPU choose float32 or bfloat16")
    return jnp.dtype(known)


def read_config(model_class, directory: pathlib.Path):
    """The config of a component. Raises ValueError for what we do not compute, naming the directory."""
    published = read_json(directory / "config.json")
    if issubclass(model_class, CLIPTextModel) and "text_config" in published:
        loader = "CLIPTextModelWithProjection" if model_class is CLIPTextModelWithProjection else "CLIPTextModel"
        raise ValueError(
            f"{directory} is a whole CLIP. Take its text encoder alone:\n"
            f'  python -c "from transformers import {loader} as M;'
            f" M.from_pretrained('{directory}').save_pretrained('DIR')\""
        )
    try:
        return model_class.Config.from_json(published)
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from error


def skeleton(model_class, directory: pathlib.Path):
    """A component without weights: the graph of its module, and the tree of its parameters' shapes."""
    return _skeleton(model_class, read_config(model_class, directory))


@functools.cache  # a comparison loads its base for each method
def _skeleton(model_class, config):
    return split(nnx.eval_shape(lambda: model_class(config, rngs=one_key())))


def load_module(model_class, directory: pathlib.Path, dtype=jnp.float32, *, variant=None, sharding=None):
    """A module with the weights of a component directory (config.json, safetensors).

    Args:
        dtype, variant, sharding: as StableDiffusion.from_pretrained has them.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the config asks for what we do not compute, a file is damaged, or weights are
            missing, unexpected or misshapen; the message names the directory and all of them.
    """
    # transformers calls the file of whatever it publishes "model".
    stem = next((stem for known, stem in PARTS.values() if issubclass(model_class, known)), "model")
    graph, abstract = skeleton(model_class, directory)
    dtype = computing_dtype(model_class, directory, dtype)
    try:
        tensors = open_tensors(weight_files(directory, stem, variant))
        if issubclass(model_class, CLIPTextModel):
            tensors = without_skipped_layers(tensors, len(abstract["encoder"]["layers"]), directory)
        params = from_published(tensors, abstract, dtype, sharding)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    return nnx.merge(graph, params)


def computing_dtype(model_class, directory: pathlib.Path, dtype):
    """The dtype of a component where `dtype` is asked for.

    float16 overflows in a VAE that says force_upcast (XL's), and in T5, which is large: its stead takes bfloat16.
    """
    if jnp.dtype(dtype) != jnp.float16:
        return dtype
    if issubclass(model_class, T5EncoderModel):
        return jnp.bfloat16
    return jnp.float32 if getattr(read_config(model_class, directory), "force_upcast", False) else dtype


def without_skipped_layers(tensors: dict, layers: int, directory: pathlib.Path) -> dict:
    """A text encoder's tensors without the last layers, where num_hidden_layers wants fewer ("clip skip")."""
    kept, skipped = {}, set()
    for name, tensor in tensors.items():
        layer = TEXT_LAYER.match(name)
        if layer and int(layer[1]) >= layers:
            skipped.add(int(layer[1]))
        else:
            kept[name] = tensor
    if skipped:
        warnings.warn(
            f"{directory}: config.json says num_hidden_layers={layers}, the weights have {max(skipped) + 1}: the last"
            f" {len(skipped)} are not used, the final layer norm is",
            stacklevel=3,
        )
    return kept


def initialise(model_class, directory: pathlib.Path, dtype=jnp.float32, *, seed: int = 0, sharding=None):
    """A module of a component directory's config.json with random weights, the same in every dtype."""
    graph, abstract = skeleton(model_class, directory)
    dtype = computing_dtype(model_class, directory, dtype)
    rng = np.random.default_rng(seed)
    constants = model_class.constants(read_config(model_class, directory)) if hasattr(model_class, "constants") else {}

    def draw(path, leaf, sharding):  # on the host: hundreds of small draws on a device are as many compilations
        kind = path[-1].key
        if (name := published_name(path)) in constants:
            array = constants[name]
        elif kind in ("kernel", "embedding"):
            deviation = 0.02 if kind == "embedding" else np.prod(leaf.shape[:-1]) ** -0.5
            array = deviation * rng.standard_normal(leaf.shape, np.float32)
        else:
            array = np.full(leaf.shape, kind == "scale", np.float32)
        return put(array.astype(dtype), sharding)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, abstract, for_each_leaf(sharding, abstract)))


def save(module, directory: pathlib.Path, config: dict, *, stem: str, prefix: str = "", dtype=np.float32):
    """Writes a component directory: config.json and {stem}.safetensors, names after `prefix`."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config)
    tensors = {name: array.astype(dtype) for name, array in to_published(split(module)[1], prefix).items()}
    write_safetensors(tensors, directory / f"{stem}.safetensors", metadata={"format": "pt"})
