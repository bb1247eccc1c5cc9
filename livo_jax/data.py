"""Preference pairs: a TFDS dataset in array_record -> Grain -> batches.

A dataset (data_tools/build_preferences.py writes them) holds records {prompt, value, scene, aligned,
violating, provenance} with encoded images. All records of one value and scene lie together, and
metadata.json lists these blocks, so that a violating partner can be drawn from the same scene without
reading the others.
"""

import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np

from livo_jax import files, sharding, values
from livo_jax.models.weights import split
from livo_jax.pretrained import read_dtype
from livo_jax.values import Value, attributed, phrase, value_prompt
from livo_jax.workdir import is_remote

SIDES = ("aligned", "violating")
FEATURES = {"prompt", "value", "scene", "aligned", "violating", "provenance"}


class Block(NamedTuple):
    """The records start .. start + count - 1, of one value (its statement) and scene."""

    value: str
    scene: str
    start: int
    count: int


class Records:
    """Serialised tf.train.Examples as dicts of bytes: a third of the time that TFDS takes to decode them."""

    def __init__(self, serialised, directory):
        self.serialised, self.directory = serialised, directory

    def __len__(self):
        return len(self.serialised)

    def __getitem__(self, i) -> dict[str, bytes]:
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            columns = tf_example_pb2.Example.FromString(self.serialised[i]).features.feature
        except Exception as error:  # array_record names no type of its own
            raise ValueError(
                f"{self.directory}, record {i} is damaged: {error}. python -m data_tools.check_preferences"
                f" --data={self.directory} lists all that is; remove it and build it again"
            ) from error
        return {name: columns[name].bytes_list.value[0] for name in FEATURES}


class Preferences:
    """An opened dataset: `source` gives record i as a dict of bytes, `blocks` partition the records."""

    def __init__(self, directory):
        """Opens and checks a dataset.

        Raises:
            FileNotFoundError: there is no dataset.
            ValueError: it is empty, half-written or of another layout; the message says in what.
        """
        import tensorflow_datasets as tfds

        self.directory = pathlib.Path(directory).expanduser()
        remedy = "make one with python -m data_tools.build_preferences --config=FILE --out=DIR"
        if not (self.directory / "dataset_info.json").is_file():
            raise FileNotFoundError(f"{self.directory} holds no preference dataset (no dataset_info.json): {remedy}")
        builder = tfds.builder_from_directory(self.directory)
        split = builder.info.splits.get("train")
        if split is None or not split.num_examples:
            raise ValueError(f"{self.directory} is an empty dataset: {remedy}")
        if missing := FEATURES - set(builder.info.features):
            raise ValueError(f"{self.directory} lacks the features {sorted(missing)}: {remedy}")
        if missing := [str(path) for path in split.filepaths if not path.exists()]:
            raise ValueError(f"{self.directory} is half-written, without {', '.join(missing)}: {remedy}")
        try:
            raw = tfds.decode.DeserializeMethod.RAW_BYTES
            self.source = Records(builder.as_data_source(split="train", deserialize_method=raw), self.directory)
            self.source[len(self.source) - 1]
        except Exception as error:  # array_record names no type of its own for a file that is cut short
            raise ValueError(f"{self.directory} is damaged: {error}; {remedy}") from error
        metadata = builder.info.metadata or {}
        self.content_sha256 = metadata.get("content_sha256")
        self.blocks = [Block(**block) for block in metadata.get("blocks", [])]
        covered = [i for b in self.blocks for i in (b.start, b.start + b.count)]
        if len(self.source) != split.num_examples or covered[:1] + covered[-1:] != [0, len(self.source)]:
            raise ValueError(f"{self.directory} is half-written: its blocks and its records differ; {remedy}")

    def check_values(self, values: tuple[Value, ...]):
        """Raises ValueError unless the dataset has every one of these values and no other."""
        wanted, there = {v.statement for v in values}, {b.value for b in self.blocks}
        if wanted != there:
            raise ValueError(
                f"{self.directory} has pairs for the values {sorted(there)}, the config lists {sorted(wanted)}:"
                " set config.principles to those of the dataset, or build another"
            )


def cache_dtype(config) -> np.dtype:
    """Of a cache's moments and states: float32 where the models are, float16 else."""
    return np.dtype("float32" if read_dtype(config.dtype, "config.dtype") == np.float32 else "float16")


def cache_made_of(preferences: Preferences, sd, config) -> dict:
    """All that a cache depends on, as JSON values: the pairs, how they are decoded, and the weights that read them."""
    digest = hashlib.sha256()
    for module in (sd.vae, sd.text_encoder):
        for array in jax.tree.leaves(split(module)[1]):
            digest.update(sharding.fetch(array).tobytes())
    return {
        "pairs": preferences.content_sha256,
        "decoded": f"as a viewer shows it, shorter side to {sd.image_size}, centre crop",
        "random_flip": config.data.random_flip,
        "wordings": [[*v.wordings, v.aligned, *v.attributes] for v in values.load(config.principles)],
        "rewordings": [name for name in ("beside", "anchors") if config.data[name]],
        "dtype": read_dtype(config.dtype, "config.dtype").name,
        "weights": digest.hexdigest(),
    }


def cache_directory(preferences: Preferences, workdir) -> pathlib.Path:
    """Where a run has the cache of its pairs: beside them or, where nothing can be written there, in its workdir.

    Raises ValueError where that is a bucket, from which nothing can be memory-mapped.
    """
    beside = preferences.directory / "cache"
    if beside.exists() or os.access(preferences.directory, os.W_OK):
        return beside
    if is_remote(workdir):
        raise ValueError(
            f"config.data.cache=True: {preferences.directory} cannot be written, nor can a cache lie in {workdir}: copy"
            " the pairs to a disk, or set it to False"
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
        made_of, wanted = json.loads((directory / "made_of.json").read_text()), cache_made_of(preferences, sd, config)
        if {*wanted["rewordings"]} <= {*made_of.get("rewordings", ())}:  # more prompts than are wanted will do
            made_of["rewordings"] = wanted["rewordings"]
        if different := [name for name in wanted if made_of.get(name) != wanted[name]]:
            raise ValueError(
                f"{directory} is of another dataset, config or model: {remedy}\n  "
                + "\n  ".join(f"{name}: {made_of.get(name)!r} there, {wanted[name]!r} wanted" for name in different)
            )
        self.aligned, self.violating, self.states = (
            np.load(directory / f"{name}.npy", mmap_mode="r") for name in (*SIDES, "states")
        )
        pooled = directory / "text_embeds.npy"
        self.text_embeds = np.load(pooled, mmap_mode="r") if pooled.exists() else None
        self.place = {prompt: i for i, prompt in enumerate(json.loads((directory / "prompts.json").read_text()))}


def shows(aligned: dict, violating: dict) -> tuple[str, str] | None:
    """The attributes that two records' images show, (aligned, violating); None where they do not tell."""
    try:
        aligned, violating = json.loads(aligned["provenance"]), json.loads(violating["provenance"])
        told = aligned["aligned_shows"], violating["violating_shows"]
    except (ValueError, KeyError, TypeError):  # the provenance of imported pairs is any text
        return None
    return told if all(told) else None


def reworded(prompt: str, subject: str, wording: str) -> str:
    """The prompt with the wording of its subject, and the article that it wants; itself where it lacks the subject."""
    template = re.sub(rf"\ban? {re.escape(subject)}\b", "a(n) {}", prompt, count=1)
    template = re.sub(rf"\b{re.escape(subject)}\b", "{}", template, count=1)
    return phrase(template, wording.format(subject=subject)) if "{}" in template else prompt


def harm_wordings(principles: Iterable[Value]) -> list[str]:
    return [wording for value in principles if value.kind == "harm" for wording in value.wordings]


def anchor(value: Value, prompt: str, subject: str, attribute: str = "") -> str:
    """A pair's prompt in words that the value should leave alone: that state an attribute, or without the harm."""
    if value.kind == "bias":
        return reworded(prompt, subject, value.wordings[0].format(attribute=attribute, subject="{subject}"))
    worded = lambda wording: wording.format(subject=subject)
    for wording in value.wordings:
        prompt = reworded(prompt, worded(wording), worded(value.aligned))
    return prompt


def prompts_of(prompt: str, block: Block, config, principles: Iterable[Value]) -> set[str]:
    """What batches can make of a record's prompt: itself, and its rewordings for config.data.beside and anchors."""
    value, found = next(value for value in principles if value.statement == block.value), {prompt}
    if config.data.beside and value.kind == "bias":
        found |= {reworded(prompt, block.scene, wording) for wording in harm_wordings(principles)}
    if config.data.anchors:
        found |= {anchor(value, prompt, block.scene, attribute) for attribute in value.attributes or ("",)}
    return found


def decode(png: bytes, size: int, flip: bool = False, where: str = "an image") -> np.ndarray:
    """What files.read_image reads as [size, size, 3] float32 in [-1, 1]: shorter side to `size`, centre crop.

    Raises ValueError, which names `where`, if it cannot be read.
    """
    from PIL import Image, ImageOps

    try:
        image = files.read_image(png)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    array = np.asarray(image, np.float32) / 127.5 - 1
    return array[:, ::-1] if flip else array


def batches(
    preferences: Preferences,
    tokenize,
    cache: Cache | None = None,
    *,
    batch_size: int,
    image_size: int,
    random_flip: bool,
    seed: int,
    start: int = 0,
    principles: tuple[Value, ...] = (),
    beside: float = 0.0,
    attributes: float = 0.0,
    anchors: float = 0.0,
    concepts: bool = False,
    paired: bool = False,
    reads_prompt: bool = True,
):
    """An endless, deterministic iterator over this process's share of each batch.

    Each epoch walks the aligned images in a new order; the violating partner of each is drawn at
    random from the same value and scene, perhaps of another prompt. Both are flipped, or neither.

    Args:
        tokenize: texts -> ids [N, L] int32, of XL [N, 2, L].
        cache: the dataset's; None decodes the images.
        batch_size: of the global batch; divisible by the number of processes.
        start: how many batches to pass over. They are not read: batch n depends on (seed, n) alone, whatever
            came before it and on however many processes.
        principles: the values that are trained.
        beside: the share of the pairs that have a second value beside their own, any of the others. Beside a harm, a
            bias's prompt is worded harmfully, as those prompts are for which both are wanted.
        attributes: the share of a bias's pairs whose value names an attribute ("statement: attribute"): that of the
            aligned image or, with the images' parts exchanged, that of the violating one; each attribute as often
            as the others. Pairs that do not tell what they show (provenance) are without.
        anchors: the share of the pairs whose prompt is one that the value should leave alone (`anchor`): a harm's is
            harmless, a bias's states the attribute of the aligned image, which may be exchanged as above.
        concepts: whether value_prompt_ids are of concepts: the prompts in a harm's wording, the prompts themselves
            being those of its aligned images (baselines/concept_ablation.py).
        paired: whether the violating partner is of the aligned image's own prompt, as a loss wants it that compares
            the two. The record's own violating image always is.
        reads_prompt: as the value encoder has it.

    Returns:
        A grain DatasetIterator of dicts: `prompt_ids` and `value_prompt_ids`
        [b, L] int32, `aligned` and `violating` [b, H, W, 3] float32 in [-1, 1]; from a cache
        `prompt_states` [b, L, D] (of XL also `text_embeds` [b, P]), `aligned_moments` and `violating_moments`
        [b, h, w, 2C] in place of prompt_ids and the images. With `beside` also `beside_prompt_ids` [b, L], what the
        value encoder reads of the second value, and `beside` [b] bool, whether there is one. With `anchors` also
        `anchor` [b] bool, whether the prompt is one that the value should leave alone.
    """
    import grain

    source, blocks = preferences.source, preferences.blocks
    starts = np.array([b.start for b in blocks])
    ids = functools.cache(lambda text: tokenize([text])[0])
    by_statement = {value.statement: value for value in principles}

    @functools.cache
    def prompts_in(block):
        return [source[i]["prompt"] for i in range(block.start, block.start + block.count)]

    def pair(index, rng: np.random.Generator):
        block = blocks[np.searchsorted(starts, index, side="right") - 1]
        record, partners = source[index], range(block.count)
        if paired:
            partners = [i for i, prompt in enumerate(prompts_in(block)) if prompt == record["prompt"]]
        partner = block.start + int(partners[rng.integers(len(partners))])
        flip = random_flip and rng.random() < 0.5
        prompt, statement = record["prompt"].decode(), record["value"].decode()
        value, read, stands_beside = by_statement.get(statement), {}, ""
        if beside and len(principles) > 1:
            second = principles[rng.choice([i for i, other in enumerate(principles) if other is not value])]
            read["beside"] = rng.random() < beside
            if read["beside"] and (value.kind, second.kind) == ("bias", "harm"):
                prompt = reworded(prompt, block.scene, rng.choice(second.wordings))
            stands_beside = second.statement  # or that with an attribute: it may be any token that can stand there
            if second.attributes and rng.random() < attributes:
                stands_beside = attributed(stands_beside, rng.choice(second.attributes))
        images = {"aligned": (index, "aligned"), "violating": (partner, "violating")}
        anchored = anchors and rng.random() < anchors and prompt == record["prompt"].decode()
        named = attributes and not anchored and rng.random() < attributes
        own_prompt = prompt
        if (anchored or named) and (shown := shows(record, source[partner])):
            exchanged = rng.random() < 1 / len(value.attributes)
            if exchanged:
                images = dict(zip(images, reversed(images.values())))
            if anchored:
                prompt = anchor(value, prompt, block.scene, shown[exchanged])
            else:
                statement = attributed(statement, shown[exchanged])
        if anchored and value.kind == "harm":
            prompt = anchor(value, prompt, block.scene)
        if anchors:
            read["anchor"] = prompt != own_prompt
        text = value_prompt(statement, prompt if reads_prompt else "")
        if stands_beside:  # it reads the prompt as it is now, as where images are drawn
            read["beside_prompt_ids"] = ids(value_prompt(stands_beside, prompt if reads_prompt else ""))
        if concepts:
            if value.kind == "harm":
                text, prompt = prompt, anchor(value, prompt, block.scene)
            else:
                text = reworded(prompt, block.scene, rng.choice(harm_wordings(principles)))
        read["value_prompt_ids"] = ids(text)
        if cache:
            read["prompt_states"] = cache.states[cache.place[prompt]]
            if cache.text_embeds is not None:
                read["text_embeds"] = cache.text_embeds[cache.place[prompt]]
            for side, (i, stored) in images.items():
                read[f"{side}_moments"] = getattr(cache, stored)[i, int(flip)]
            return read
        for side, (i, stored) in images.items():
            where = f"{preferences.directory}, record {i}, {stored}"
            read[side] = decode((record if i == index else source[i])[stored], image_size, flip, where)
        return read | {"prompt_ids": ids(prompt)}

    dataset = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat().random_map(pair)
    # Process p takes rows p*b .. (p+1)*b - 1 of each batch, so that rows do not depend on their number.
    mine, processes = jax.process_index(), jax.process_count()
    dataset = dataset.batch(batch_size // processes)[start * processes + mine :: processes]
    threads = min(16, 2 * os.cpu_count())  # more would wait for each other's Python
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=16)))
