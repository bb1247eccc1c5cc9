"""The judge that compares images with texts: zero-shot CLIP (Radford et al. 2021)."""

import functools
import pathlib

import jax
import numpy as np
from flax import nnx

from livo_jax.files.modules import load_module
from livo_jax.files.repositories import find_repository, read_json, read_tokenizer, weight_files, weight_patterns
from livo_jax.judges import Judge, hash_files
from livo_jax.models.clip import CLIPModel
from livo_jax.models.weights import split
from livo_jax.values.principles import phrase

BATCH = 32  # images at once; the last batch is filled up, so that one size is compiled
SUBJECT = "a photo of a(n) {}"
PROCESSOR = "preprocessor_config.json"
FILES = ["config.json", PROCESSOR, "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json"]
FILES += weight_patterns("model", None)


def make(config, values, subjects) -> Judge:
    """The judge of a published CLIP.

    Args:
        config: `judging.model` is its directory or hub id, as openai/clip-vit-large-patch14; where
            `judging.subject`, subjects are read.
        values: their `classes` are the texts.

    Returns:
        A Judge that reads of a bias value's axis the attribute and of "subject" the subject whose text is the most
        similar; of a harm value's axis the probability, 0 to 1, of the text of the harm against that of its absence.

    Raises:
        ValueError: the config names no model, a value has no classes, or there is none; all are listed. Or the
            model's files are damaged, or ask for what we do not compute.
        FileNotFoundError: the model is not here; the message says how to fetch it.
    """
    problems = [f"the value {v.name!r} has no `classes` in principles.toml" for v in values if not v.classes]
    if not values:
        problems.append("there is no value to read")
    if not config.judging.model:
        problems.append("config.judging.model is empty: give a directory or hub id, as openai/clip-vit-large-patch14")
    if problems:
        raise ValueError("the judge clip cannot work: " + "; ".join(problems))
    model, tokenize, preprocess = published(config.judging.model)
    graph, params = split(model)

    texts = {value: list(value.classes) for value in values}
    if config.judging.subject:
        texts["subject"] = [phrase(SUBJECT, subject) for subject in subjects]
    ids = tokenize(sum(texts.values(), []))
    text_features = jax.jit(lambda params, ids: nnx.merge(graph, params).text_features(ids))(params, ids)

    @jax.jit
    def compare(params, text_features, pixels):
        model = nnx.merge(graph, params)
        return model.logits(model.image_features(pixels), text_features)

    def read(images):
        logits = compute_in_batches(lambda pixels: compare(params, text_features, pixels), images, preprocess)
        ends = np.cumsum([len(group) for group in texts.values()])
        reading = {}
        for what, column in zip(texts, np.split(logits, ends[:-1], axis=1)):  # column: [B, texts]
            if what == "subject":
                reading["subject"] = np.array(subjects)[column.argmax(1)]
            elif what.kind == "bias":
                reading[what.axis] = np.array(what.attributes)[column.argmax(1)]
            else:
                reading[what.axis] = np.asarray(jax.nn.softmax(column))[:, 0]
        return reading

    weights = hash_files(weight_files(find_repository(config.judging.model, FILES), "model", None))
    classes = {value.name: list(value.classes) for value in values}
    return Judge(read, {"name": "clip", "model": str(config.judging.model), "weights": weights, "classes": classes})


def compute_in_batches(compute, images, preprocess) -> np.ndarray:
    """compute(pixels [BATCH, size, size, 3]) -> [BATCH, ...] of images [B, H, W, 3] uint8: [B, ...]."""
    found = []
    for start in range(0, len(images), BATCH):
        pixels = preprocess(images[start : start + BATCH])
        whole = np.pad(pixels, ((0, BATCH - len(pixels)), (0, 0), (0, 0), (0, 0)))
        found.append(np.asarray(compute(whole))[: len(pixels)])
    return np.concatenate(found)


@functools.lru_cache(maxsize=1)  # a run asks for its judge before it builds pairs, to build them, and to evaluate
def published(path_or_hub_id):
    """A published CLIP: the CLIPModel, tokenize(texts) -> [T, L] int ids, and `preprocess` as its processor has it.

    Raises:
        FileNotFoundError: it is not here; the message says how to fetch it.
        ValueError: its files are damaged, or ask for what we do not compute.
    """
    root = find_repository(path_or_hub_id, FILES)
    model, tokenizer = load_module(CLIPModel, root), read_tokenizer(root)
    text = model.config.text_config
    if len(tokenizer) != text.vocab_size:  # without files it is an empty one
        raise ValueError(
            f"{root} has a text model of {text.vocab_size} tokens and a tokenizer of {len(tokenizer)}: are vocab.json"
            " and merges.txt, or tokenizer.json, there?"
        )
    size, length = model.config.vision_config.image_size, text.max_position_embeddings
    mean, std = read_processor(root, size)

    def tokenize(texts):
        return np.array(tokenizer(list(texts), truncation=True, max_length=length, padding="max_length")["input_ids"])

    return model, tokenize, functools.partial(preprocess, size=size, mean=mean, std=std)


def read_processor(root: pathlib.Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the standard deviation, [3] float32, of a published preprocessor_config.json.

    Raises:
        ValueError: it asks for other than what `preprocess` does to `size` pixels; all of that is listed.
    """
    published = read_json(root / PROCESSOR)
    done = {  # the sizes as old and as new files have them
        "do_resize": (True,), "size": (size, {"shortest_edge": size}), "resample": (3,),
        "do_center_crop": (True,), "crop_size": (size, {"height": size, "width": size}),
        "do_rescale": (True,), "rescale_factor": (1 / 255,), "do_normalize": (True,),
    }  # fmt: skip
    problems = [f"{n}={published[n]!r} (only {x[-1]!r})" for n, x in done.items() if published.get(n, x[0]) not in x]
    problems += [f"no {name}" for name in ("image_mean", "image_std") if name not in published]
    if problems:
        raise ValueError(f"{root / PROCESSOR} has " + ", ".join(problems))
    return tuple(np.array(published[name], np.float32) for name in ("image_mean", "image_std"))


def preprocess(images, size: int, mean, std) -> np.ndarray:
    """What transformers' CLIPImageProcessor makes of images: resized bicubically, cropped, normalised.

    Args:
        images: [B, H, W, 3] uint8. mean, std: [3] of the colours as 0 to 1.

    Returns:
        [B, size, size, 3] float32.
    """
    from PIL import Image

    H, W = images.shape[1:3]
    h, w = (size * side // min(H, W) for side in (H, W))
    top, left = (h - size) // 2, (w - size) // 2
    box = (left, top, left + size, top + size)
    small = [np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC).crop(box)) for image in images]
    return (np.array(small, np.float32) / 255 - mean) / std
