"""Writing the cache of latents and prompt states beside preference pairs.

data_tools/cache_latents.py is the command.
"""

import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from livo_jax import data, sharding, values
from livo_jax.data.dataset import held, my_share
from livo_jax.models.weights import split
from livo_jax.processes import ending_together
from livo_jax.sampling.stable_diffusion import StableDiffusion


def on_the_mesh(module, compute, at_once: int):
    """compute(module, rows), a tree, as a function of 1 to `at_once` rows, divided over this process's devices."""
    mesh = sharding.make_local_mesh()
    graph, params = split(module)
    params = jax.device_put(params, sharding.replicated(mesh))
    compiled = jax.jit(lambda params, x: compute(nnx.merge(graph, params), x))

    def run(x):
        padded = np.concatenate([x, np.repeat(x[-1:], at_once - len(x), axis=0)])
        found = compiled(params, jax.device_put(padded, sharding.over_batch(mesh)))
        return jax.tree.map(lambda array: np.asarray(array)[: len(x)], found)

    return run


def write(preferences: data.Preferences, sd: StableDiffusion, config, directory: pathlib.Path | None = None):
    """Writes a dataset's cache, whole or not at all; data.Cache reads it and tells its layout.

    Each process encodes its share of the images with its own devices; process 0 reads the prompts.

    Args:
        directory: where it is to lie; beside the pairs if None.

    Raises:
        FileExistsError: another process is writing it.
        ValueError: the dataset has pairs for other values than the config's.
        OSError: the disk has no space for it.
    """
    principles = values.load_principles(config)
    preferences.check_values(principles)
    directory = directory or preferences.directory / "cache"
    work = directory.with_name(".cache.partial")
    count, source = len(preferences.source), preferences.source
    dtype = data.cache_dtype(config)
    at_once = config.sampling.batch_size * jax.local_device_count()
    encode = on_the_mesh(sd.vae, lambda vae, x: jnp.concatenate(vae.encode(x), axis=-1), at_once)

    def states_of(text_encoder, ids):
        text = text_encoder(ids)
        found = {"states": text.last_hidden_state, "text_embeds": text.text_embeds}
        return {name: array for name, array in found.items() if array is not None}

    read = on_the_mesh(sd.text_encoder, states_of, at_once)

    def chunks(rows):
        return [rows[i : i + at_once] for i in range(0, len(rows), at_once)]

    def create(name, shape, dtype=dtype):
        array = np.lib.format.open_memmap(work / f"{name}.npy", "w+", dtype, shape)
        with open(array.filename, "r+b") as file:  # a page that a full disk lacks would kill without a word
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(array.filename))
        return array

    with held(work):
        with ending_together():
            if jax.process_index() == 0:
                prompts = set()
                for block in tqdm(preferences.blocks, desc="prompts", unit="block"):
                    for i in range(block.start, block.start + block.count):
                        prompts |= data.prompts_of(source[i]["prompt"].decode(), block, config, principles)
                prompts = sorted(prompts)
                (work / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
                h, w, channels = sd.latent_shape
                for side in data.SIDES:
                    create(side, (count, 1 + config.data.random_flip, h, w, 2 * channels))
                stored = {"states": create("states", (len(prompts), *sd.family.states_shape))}
                if sd.family.pooled_width:
                    stored["text_embeds"] = create("text_embeds", (len(prompts), sd.family.pooled_width))
                for rows in chunks(range(len(prompts))):
                    found = read(sd.tokenize(prompts[rows.start : rows.stop]))
                    for name, array in stored.items():
                        array[rows.start : rows.stop] = found[name]
                for array in stored.values():
                    array.flush()
        with ending_together():
            moments = {side: np.lib.format.open_memmap(work / f"{side}.npy", "r+") for side in data.SIDES}
            parts = chunks(range(count))
            for k in tqdm(my_share(len(parts)), desc="latents", unit="batch"):
                records = [source[i] for i in parts[k]]
                for side in data.SIDES:
                    places = [f"{preferences.directory}, record {i}, {side}" for i in parts[k]]
                    for flip in range(1 + config.data.random_flip):
                        images = [
                            data.decode(record[side], sd.image_size, bool(flip), place)
                            for record, place in zip(records, places)
                        ]
                        moments[side][parts[k].start : parts[k].stop, flip] = encode(np.stack(images))
            for array in moments.values():
                array.flush()
        with ending_together():
            if jax.process_index() == 0:
                made_of = json.dumps(data.cache_made_of(preferences, sd, config), indent=2)
                (work / "made_of.json").write_text(made_of + "\n", encoding="utf-8")
                shutil.rmtree(directory, ignore_errors=True)
                (work / "lock").unlink()
                work.rename(directory)
