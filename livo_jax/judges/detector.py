"""The judge of objects, as GenEval's (Ghosh et al. 2023): what a published detector finds, where, and of which colour.

Whether that is what a prompt states livo_jax/evaluation/objects.py says.
"""

import functools
import json
import types
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from livo_jax.files.repositories import find_repository, read_json, weight_files, weight_patterns
from livo_jax.judges import COLOURS, Judge, _labels, clip, hash_files
from livo_jax.judges._pytorch import load_pytorch, pin_pytorch, pytorch_problems
from livo_jax.models.clip import unit
from livo_jax.models.weights import split
from livo_jax.values.principles import phrase

BATCH = 8  # images at once
MOST = 16  # objects of a class, the surest
COLOUR_TEXTS = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
BEHIND = 153  # the grey, #999, of what is around a mask
CLASS_TEXT = "a photo of a(n) {}"  # by which an open-vocabulary detector looks for a class
OPEN = ("owlvit", "owlv2")  # model types of transformers that are asked for each class apart
MASKS = ("mask2former",)  # those that find silhouettes; GenEval's own is one
LOGITS = ("class_queries_logits", "masks_queries_logits")  # of MASKS
COCO = (  # as GenEval calls them
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
FILES = ["*config.json", "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json"]
FILES += weight_patterns("model", None)


class Found(NamedTuple):
    """An object: the number of its class, its score, 0 to 1, its box, (left, top, right, bottom) in pixels, and of a
    detector that finds silhouettes its own, [H, W] bool."""

    label: int
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


def make(config, values, subjects) -> Judge:
    """The judge of an object detector, which transformers computes with PyTorch, and of a CLIP for colours.

    Args:
        config: of `judging`: `model` is the detector's directory or hub id, as
            facebook/mask2former-swin-small-coco-instance: one of closed classes, of boxes or of silhouettes, or an
            OWL-ViT or OWLv2, which looks for `classes`, COCO's where that is empty; `colours` is a CLIP's, empty where
            no colour is to be read. An object is one above `detected_from`, and counted above `counted_from`.
            `labels` says of which axis classes are, as ("knife=weapons",), where values are to be read.

    Returns:
        A Judge that reads on the axis "objects" what livo_jax/evaluation/objects.py takes, of each class the MOST
        surest; of a harm value's axis the highest score of its classes, 0 to 1, and 0 where none is found.

    Raises:
        ValueError: PyTorch is not installed, the config names no model, thresholds are out of range, classes, labels
            or values do not fit it, or a value is a bias, which objects show nothing of; all are listed. Or a directory
            holds no such model.
        FileNotFoundError: a model or its weights are not here.
    """
    c, labels = config.judging, []
    problems = pytorch_problems(config, "a directory or hub id of an object detector")
    problems += [
        f"the value {value.name!r} is a bias, of which objects show nothing: have another judge read it"
        for value in values
        if value.kind == "bias"
    ]
    if not 0 < c.detected_from <= c.counted_from < 1:
        problems.append(
            f"config.judging.detected_from={c.detected_from!r} and .counted_from={c.counted_from!r}: choose scores"
            " above 0 and below 1, the second not below the first"
        )
    if not problems:
        (detect, names, is_open), tell_colours = load_both(c)
        if c.classes and not is_open:
            problems.append(f"config.judging.classes: {c.model} has classes of its own, leave them out")
        labels, more = _labels.parse(c.labels, names, values)
        problems += more
    if problems:
        raise ValueError("the judge detector cannot work: " + "; ".join(problems))

    def read(images):
        found = [surest(of_image) for of_image in detect(images, c.detected_from)]
        crops = [(names[one.label], crop(image, one)) for image, of_image in zip(images, found) for one in of_image]
        colours = iter(tell_colours(crops) if tell_colours else ())
        texts, scores = [], np.zeros((len(images), len(names)))
        for row, of_image in enumerate(found):
            told = []
            for one in of_image:
                scores[row, one.label] = max(scores[row, one.label], one.score)
                box, counted = [round(x, 2) for x in one.box], one.score > c.counted_from
                told.append({"class": names[one.label], "score": round(one.score, 4), "box": box, "counted": counted})
                if tell_colours:
                    told[-1]["colour"] = next(colours)
            texts.append(json.dumps(told))
        return {"objects": np.array(texts)} | _labels.read(labels, names, values, scores, exclusive=False)

    pinned = {"name": "detector", "classes": list(c.labels), "detected_from": c.detected_from}
    pinned |= {"counted_from": c.counted_from} | pin_pytorch(config, FILES)
    if is_open:
        pinned["looked_for"] = list(names)
    if tell_colours:
        of_clip = hash_files(weight_files(find_repository(c.colours, clip.FILES), "model", None))
        pinned["colours"] = {"model": str(c.colours), "weights": of_clip}
    return Judge(read, pinned, objects=tuple(names), colours=COLOURS if tell_colours else ())


def load_both(judging) -> tuple:
    """What `published` and `colour_reader` give of a config's section, None without colours; their errors together."""
    loaded, errors = [], []
    for load, arguments in (
        (published, (judging.model, tuple(judging.classes) or COCO)),
        (colour_reader, (judging.colours,)),
    ):
        try:
            loaded.append(load(*arguments) if arguments[0] else None)
        except (ValueError, FileNotFoundError) as error:
            errors.append(error)
    if errors:
        raise type(errors[0])("\n".join(map(str, errors))) from errors[0]
    return tuple(loaded)


def surest(found: list[Found]) -> list[Found]:
    """Of each class the MOST of the highest scores, the highest first."""
    kept, of_class = [], {}
    for one in sorted(found, key=lambda one: -one.score):  # stable
        of_class[one.label] = of_class.get(one.label, 0) + 1
        if of_class[one.label] <= MOST:
            kept.append(one)
    return kept


# ---------------------------------------------------------------------------- detectors that transformers computes


@functools.lru_cache(maxsize=1)  # a run asks for its judge before it draws, and to evaluate
def published(path_or_hub_id, classes: tuple[str, ...]):
    """A published object detector, on the GPU if PyTorch has one. No code that comes with it runs.

    Args:
        classes: that it looks for, if it has none of its own.

    Returns:
        detect(images [B, H, W, 3] uint8, least) -> a list of Found for each image, of scores above `least`; the names
        of the classes; and whether they are `classes`.

    Raises:
        FileNotFoundError: it or its weights are not here.
        ValueError: transformers cannot read it, it is of another kind, or it lacks weights.
    """
    import torch
    import transformers

    root = find_repository(path_or_hub_id, FILES)
    model_type = read_json(root / "config.json").get("model_type")
    is_open, has_masks = model_type in OPEN, model_type in MASKS
    processor_class = transformers.AutoProcessor if is_open else transformers.AutoImageProcessor
    model_class = transformers.AutoModelForObjectDetection
    if is_open:
        model_class = transformers.AutoModelForZeroShotObjectDetection
    elif has_masks:
        model_class = transformers.AutoModelForUniversalSegmentation
    processor, model, missing = load_pytorch(root, processor_class, model_class, "object detector")
    if missing:
        raise ValueError(f"{root} has no weights {', '.join(missing)}: it is no trained object detector")
    own = model.config.id2label
    names = dict(enumerate(classes)) if is_open else {i: own[i] for i in sorted(own)}
    columns, texts = {i: column for column, i in enumerate(names)}, [phrase(CLASS_TEXT, name) for name in classes]

    def compute(images, least: float) -> list[list[Found]]:
        asked = {"text": [texts] * len(images)} if is_open else {}
        inputs = processor(images=list(images), return_tensors="pt", **asked)
        outputs, sizes = model(**inputs.to(model.device, model.dtype)), [image.shape[:2] for image in images]
        if has_masks:
            logits = types.SimpleNamespace(**{name: outputs[name].float().cpu() for name in LOGITS})
            found = processor.post_process_instance_segmentation(
                logits, threshold=least, target_sizes=sizes, return_binary_maps=True
            )
            return [of_masks(of["segmentation"], of["segments_info"], columns) for of in found]
        kind = "grounded_object_detection" if is_open else "object_detection"
        found = getattr(processor, f"post_process_{kind}")(outputs, threshold=least, target_sizes=torch.tensor(sizes))
        rows = [zip(*(of[name].tolist() for name in ("labels", "scores", "boxes"))) for of in found]
        return [[Found(columns[label], score, tuple(box)) for label, score, box in of] for of in rows]

    @torch.inference_mode()
    def detect(images, least: float) -> list[list[Found]]:
        parts = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
        return [[one for one in found if one.score > least] for part in parts for found in compute(part, least)]

    return detect, [*names.values()], is_open


def of_masks(masks, segments: list[dict], columns: dict[int, int]) -> list[Found]:
    """The objects of silhouettes [N, H, W], 0 or 1, and what transformers says of each; columns: of its labels."""
    found = []
    for mask, segment in zip(masks, segments):
        mask = mask.numpy() > 0
        y, x = np.nonzero(mask)
        box = tuple(float(edge) for edge in (x.min(), y.min(), x.max() + 1, y.max() + 1))
        found.append(Found(columns[segment["label_id"]], segment["score"], box, mask))
    return found


# ---------------------------------------------------------------------------- colours


@functools.lru_cache(maxsize=1)
def colour_reader(path_or_hub_id):
    """GenEval's zero-shot classification of colours, by a CLIP.

    Returns:
        tell([(name of its class, crop [h, w, 3] uint8), ...]) -> of each object the one of COLOURS whose texts, the
        mean of COLOUR_TEXTS' directions, its crop is the most similar to.

    Raises:
        FileNotFoundError, ValueError: as clip.published.
    """
    model, tokenize, preprocess = clip.published(path_or_hub_id)
    graph, params = split(model)

    @jax.jit
    def embed_texts(params, ids):
        return nnx.merge(graph, params).text_features(ids)

    @jax.jit
    def embed_images(params, pixels):
        return nnx.merge(graph, params).image_features(pixels)

    @functools.cache
    def classifier(name: str):  # [colours, features]
        texts = [text.format(colour=colour, name=name) for colour in COLOURS for text in COLOUR_TEXTS]
        features = unit(embed_texts(params, tokenize(texts)))
        return np.asarray(unit(features.reshape(len(COLOURS), len(COLOUR_TEXTS), -1).mean(1)))

    def tell(objects) -> list[str]:
        if not objects:
            return []
        pixels = np.concatenate([preprocess(image[None]) for _, image in objects])
        features = clip.compute_in_batches(lambda part: embed_images(params, part), pixels, lambda part: part)
        return [COLOURS[int((classifier(name) @ of).argmax())] for (name, _), of in zip(objects, features)]

    return tell


def crop(image, found: Found) -> np.ndarray:
    """[h, w, 3] of the image within an object's box, a pixel at least, and grey where it has a mask that is not so."""
    if found.mask is not None:
        image = np.where(found.mask[..., None], image, np.uint8(BEHIND))
    (left, top), (right, bottom) = (np.round(found.box[k : k + 2]).astype(int) for k in (0, 2))
    left, top = np.clip(left, 0, image.shape[1] - 1), np.clip(top, 0, image.shape[0] - 1)
    return image[top : max(bottom, top + 1), left : max(right, left + 1)]
