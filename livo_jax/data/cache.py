"""The cache of latents and text states beside preference pairs."""

import hashlib
import json
import os
import pathlib

import jax
import numpy as np
from absl import logging

from livo_jax import sharding, values
from livo_jax.data.preferences import SIDES, Preferences
from livo_jax.files.directories import is_remote
from livo_jax.files.modules import read_dtype
from livo_jax.models.weights import split


def cache_dtype(config) -> np.dtype:
    """Of a cache's moments and states: float32 where the models are, float16 else."""
    return np.dtype("float32" if read_dtype(config.dtype, "config.dtype") == np.float32 else "float16")


# The prompts that a field of config.data adds; another text where they have become others.
REWORDINGS = {"beside": "beside, each mention", "anchors": "anchors in the words of all values, each mention"}


def cache_made_of(preferences: Preferences, sd, config) -> dict:
    """All that a cache depends on, as JSON values: the pairs, how they are decoded, and the weights that read them."""
    digest = hashlib.sha256()
    for module in (sd.vae, sd.text_encoder):
        for array in jax.tree.leaves(split(module)[1]):
            digest.update(sharding.fetch(array).tobytes())
    made_of = {
        "pairs": preferences.content_sha256,
        "decoded": f"as a viewer shows it, shorter side to {sd.image_size}, centre crop",
        "random_flip": config.data.random_flip,
        "wordings": [[*v.wordings, v.aligned, *v.attributes] for v in values.load_principles(config)],
        "rewordings": [text for name, text in REWORDINGS.items() if config.data[name]],
        "dtype": read_dtype(config.dtype, "config.dtype").name,
        "weights": digest.hexdigest(),
    }
    if sd.family.KEY == "sd3":  # how many states T5 has is a setting, which no weight tells
        made_of["states"] = [*sd.family.states_shape]
    return made_of


def cache_faults(directory: pathlib.Path, made_of: dict) -> list[str]:
    """A line for each thing by which the cache that lies in a directory is not `made_of` (cache_made_of)."""
    try:
        there = json.loads((directory / "made_of.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"made_of.json cannot be read: {error}"]
    if {*made_of["rewordings"]} <= {*there.get("rewordings", ())}:  # more prompts than are wanted will do
        there["rewordings"] = made_of["rewordings"]
    return [f"{name}: {there.get(name)!r} there, {x!r} wanted" for name, x in made_of.items() if there.get(name) != x]


def cache_directory(preferences: Preferences, workdir, sd, config) -> pathlib.Path:
    """Where a run has the cache of its pairs: beside them or, where it would have to be written there and cannot, in
    its workdir.

    Raises ValueError where that is a bucket, from which nothing can be memory-mapped.
    """
    beside = preferences.directory / "cache"
    if os.access(preferences.directory, os.W_OK):
        return beside
    if beside.exists():
        if not cache_faults(beside, cache_made_of(preferences, sd, config)):
            return beside
        logging.warning("%s is of another dataset, config or model, and cannot be replaced: it is not used", beside)
    if is_remote(workdir):
        raise ValueError(
            f"config.data.cache=True: {preferences.directory} has no cache for this run and cannot be written, nor can"
            f" a cache lie in {workdir}: copy the pairs to a disk, or set it to False"
        )
    return pathlib.Path(workdir) / "cache"


class Cache:
    """A dataset's cache (data_tools/cache_latents.py writes it), memory-mapped.

    Attributes:
        aligned, violating: [N, F, h, w, 2C], mean and log-variance of the VAE's posterior of each image, and,
            where F is 2, of its mirror image; of cache_dtype.
        states: [U, L, D], what the text encoder makes of each of the U prompts that batches can have.
        text_embeds: [U, P], their pooled text, of XL; None of others.
        place: a prompt -> where it is among them.
    """

    def __init__(self, preferences: Preferences, sd, config, directory: pathlib.Path | None = None):
        """Opens a cache, that beside the pairs if no other directory is given.

        Raises FileNotFoundError if there is none, ValueError if it is of something else.
        """
        directory = directory or preferences.directory / "cache"
        remedy = f"make it with python -m data_tools.cache_latents --config=FILE --data={preferences.directory}"
        if not directory.exists():
            raise FileNotFoundError(f"{directory} is not there: {remedy}, or train with --config.data.cache=False")
        if faults := cache_faults(directory, cache_made_of(preferences, sd, config)):
            raise ValueError(
                f"{directory} is of another dataset, config or model: remove it, and training makes another\n  "
                + "\n  ".join(faults)
            )
        pooled = directory / "text_embeds.npy"
        try:
            self.aligned, self.violating, self.states = (
                np.load(directory / f"{name}.npy", mmap_mode="r") for name in (*SIDES, "states")
            )
            self.text_embeds = np.load(pooled, mmap_mode="r") if pooled.exists() else None
            prompts = json.loads((directory / "prompts.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{directory} is damaged: remove it, and training makes another: {error}") from error
        self.place = {prompt: i for i, prompt in enumerate(prompts)}
