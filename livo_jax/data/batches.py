"""Preference pairs: a TFDS dataset in array_record -> Grain -> batches.

A dataset (data_tools/build_preferences.py writes them) holds records {prompt, value, scene, aligned,
violating, provenance} with encoded images. All records of one value and scene lie together, and
metadata.json lists these blocks, so that a violating partner can be drawn from the same scene without
reading the others.
"""

import functools
import os

import jax
import numpy as np

from livo_jax.data.cache import Cache
from livo_jax.data.preferences import Block, Preferences, decode
from livo_jax.data.texts import PairTexts
from livo_jax.training.batch import Batch
from livo_jax.values.principles import Value, value_prompt


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
    only: str | None = None,
    address=value_prompt,
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
            harmless, a bias's states the attribute of the aligned image, which may be exchanged as above. Half of them
            say beside it what prompts of another value say.
        concepts: whether value_prompt_ids are of concepts: the prompts in a harm's wording, the prompts themselves
            being those of its aligned images (methods/concept_ablation.py).
        paired: whether the violating partner is of the aligned image's own prompt, as a loss wants it that compares
            the two. The record's own violating image always is.
        only: the statement of a value, whose records alone are read; None for all.
        address: (statement, prompt) -> what the value encoder reads.

    Returns:
        A grain DatasetIterator of training.batch.Batch, numpy arrays.
    """
    import grain

    source, blocks = preferences.source, preferences.blocks
    starts = np.array([b.start for b in blocks])
    records = [i for b in blocks if only in (None, b.value) for i in range(b.start, b.start + b.count)]
    texts = PairTexts(principles, beside, attributes, anchors, concepts, address)

    @functools.cache
    def ids_of(text: str):
        return tokenize([text])[0]

    @functools.cache
    def prompts_in(block: Block) -> list[bytes]:
        return [source[i]["prompt"] for i in range(block.start, block.start + block.count)]

    def draw_partner(rng, block: Block, prompt: bytes) -> int:
        """The record of the violating image."""
        places = range(block.count)
        if paired:
            places = [place for place, other in enumerate(prompts_in(block)) if other == prompt]
        return block.start + int(places[rng.integers(len(places))])

    def read_cached(images: dict, flip: bool, prompt: str) -> dict:
        place = cache.place[prompt]
        moments = {f"{side}_moments": getattr(cache, stored)[i, int(flip)] for side, (i, stored) in images.items()}
        pooled = None if cache.text_embeds is None else cache.text_embeds[place]
        return moments | {"prompt_states": cache.states[place], "text_embeds": pooled}

    def read_images(images: dict, flip: bool, prompt: str, record_of) -> dict:
        decoded = {
            side: decode(record_of(i)[stored], image_size, flip, f"{preferences.directory}, record {i}, {stored}")
            for side, (i, stored) in images.items()
        }
        return decoded | {"prompt_ids": ids_of(prompt)}

    def read_pair(place: int, rng: np.random.Generator) -> Batch:
        index = records[place]
        block = blocks[np.searchsorted(starts, index, side="right") - 1]
        record_of = functools.cache(source.__getitem__)
        partner = draw_partner(rng, block, record_of(index)["prompt"])
        flip = bool(random_flip and rng.random() < 0.5)
        text = texts.draw(rng, block.scene, record_of(index), lambda: record_of(partner))
        images = {"aligned": (index, "aligned"), "violating": (partner, "violating")}
        if text.exchanged:
            images = {"aligned": images["violating"], "violating": images["aligned"]}
        if cache:
            columns = read_cached(images, flip, text.prompt)
        else:
            columns = read_images(images, flip, text.prompt, record_of)
        return Batch(
            value_prompt_ids=ids_of(text.value),
            beside_prompt_ids=ids_of(text.beside) if text.beside else None,
            beside=text.stands_beside,
            anchor=text.anchor,
            harm=text.harm,
            **columns,
        )

    dataset = grain.MapDataset.range(len(records)).seed(seed).shuffle().repeat().random_map(read_pair)
    # Process p takes rows p*b .. (p+1)*b - 1 of each batch, so that rows do not depend on their number.
    mine, processes = jax.process_index(), jax.process_count()
    dataset = dataset.batch(batch_size // processes)[start * processes + mine :: processes]
    threads = min(16, 2 * os.cpu_count())  # more would wait for each other's Python
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=16)))
