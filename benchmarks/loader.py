"""Times the loader: batches of random pairs, from images and from a cache, at the size of the config's model.

    python -m benchmarks.loader --config=configs/tiny.py
    python -m benchmarks.loader --config=configs/livo.py --config.model=benchmarks/sd15

The pairs are written to a temporary directory first; what is timed comes from the system's page cache.
"""

import functools
import itertools
import pathlib
import tempfile
import types

from absl import app, flags, logging
from livo_jax.benchmarks import common  # sets what jax reads when it is imported
from ml_collections import config_flags

from livo_jax import commands

# isort: split
import numpy as np
from PIL import Image

from livo_jax import data
from livo_jax.data import dataset
from livo_jax.runs import plan
from livo_jax.runs.build_preferences import png

CONFIG = config_flags.DEFINE_config_file("config", None, "The config whose batches are timed.")
PAIRS = flags.DEFINE_integer("pairs", 512, "In the dataset.", lower_bound=1)
BATCHES = flags.DEFINE_integer("batches", 50, "In a repeat.", lower_bound=1)


def write_pairs(directory: pathlib.Path, rng, size: int):
    """A dataset of smooth random images, which compress about as photographs do."""

    def image() -> bytes:
        coarse = Image.fromarray(rng.integers(0, 256, (max(8, size // 8),) * 2 + (3,), dtype=np.uint8))
        return png(np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)))

    def record(i: int) -> dict:
        prompt = {"prompt": f"a photo of worker {i % 50}", "value": "shape equality", "scene": "worker"}
        return prompt | {"aligned": image(), "violating": image(), "provenance": "{}"}

    with dataset.under_construction(directory, {}) as work:
        blocks = [data.Block("shape equality", "worker", 0, PAIRS.value)]
        dataset.write(work, directory, record, blocks, {})


def random_cache(directory: pathlib.Path, rng, sd, config):
    """What data.batches reads of a data.Cache, memory-mapped as there."""

    def mapped(name: str, *shape):
        dtype = np.float32 if config.dtype == "float32" else np.float16
        np.save(directory / f"{name}.npy", rng.standard_normal(shape, np.float32).astype(dtype))
        return np.load(directory / f"{name}.npy", mmap_mode="r")

    (h, w, C), text = sd.latent_shape, sd.text_encoder.config
    moments = PAIRS.value, 1 + config.data.random_flip, h, w, 2 * C
    return types.SimpleNamespace(
        aligned=mapped("aligned", *moments),
        violating=mapped("violating", *moments),
        states=mapped("states", 50, text.max_position_embeddings, text.hidden_size),
        text_embeds=None,
        place={f"a photo of worker {i}": i for i in range(50)},
    )


def take(batches, n: int):
    for _ in itertools.islice(batches, n):
        pass


def main(_):
    logging.set_verbosity(logging.WARNING)
    config, rng, rows = CONFIG.value, np.random.default_rng(0), []
    sd = plan.abstract_model(config)
    with tempfile.TemporaryDirectory() as directory:
        directory = pathlib.Path(directory)
        write_pairs(directory / "pairs", rng, sd.image_size)
        for name, cache in (("cache", random_cache(directory, rng, sd, config)), ("images", None)):
            batches = data.batches(
                data.Preferences(directory / "pairs"), sd.tokenize, cache, batch_size=config.train.batch_size,
                image_size=sd.image_size, random_flip=config.data.random_flip, seed=0,
            )  # fmt: skip
            seconds = common.median_seconds(functools.partial(take, batches), lambda: BATCHES.value)
            rows.append({"from": name, "pairs_per_sec": config.train.batch_size * BATCHES.value / seconds})
    settings = {"model": config.model, "image_size": sd.image_size, "batch_size": config.train.batch_size}
    common.report("loader", settings | {"pairs": PAIRS.value, "batches": BATCHES.value}, rows)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=commands.parse)
