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
from livo_jax.data.preferences import Preferences, decode
from livo_jax.data.rewording import anchor, harm_wordings, reworded, shows
from livo_jax.values.principles import Value, attributed, value_prompt


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
            being those of its aligned images (methods/concept_ablation.py).
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
