"""Judges that are small heads on a published CLIP's image features; data_tools/convert_judge.py makes their files."""

import pathlib

import jax
import numpy as np
from flax import nnx

from livo_jax.files.repositories import find_repository, read_safetensors, weight_files
from livo_jax.judges import Judge, _labels, clip, hash_files
from livo_jax.models.weights import split


def make(config, values, kind: str, shapes: dict, names, score) -> Judge:
    """The judge of converted heads.

    Args:
        config: `judging.model` is their file, which names its CLIP: a hub id, or a directory as it lies from the file.
            `judging.labels` says of which axis the names are; where it is empty, of the axis that is called so.
        shapes: {name of a tensor: its shape}, "features" for the width of CLIP's.
        names: of the scores. score: score({name: array}, features [B, features]) -> [B, names], 0 to 1.

    Returns:
        A Judge that reads of a harm value's axis the score, 0 to 1, the highest of several.

    Raises:
        ValueError: there is no file, it is of another kind or shape, or labels or values do not fit; all are listed.
        FileNotFoundError: the CLIP is not here.
    """
    texts = tuple(config.judging.labels) or tuple(f"{name}={name}" for name in names)
    labels, problems = _labels.parse(texts, names, values)
    try:
        tensors, clip_id = read_heads(config.judging.model, kind, shapes)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError(f"the judge {kind} cannot work: " + "; ".join(problems))
    file = pathlib.Path(config.judging.model).expanduser()
    beside = file.resolve().parent / clip_id
    place = str(beside) if beside.is_dir() else clip_id
    model, _, preprocess = clip.published(place)
    if (width := model.config.projection_dim) != (wanted := features_of(tensors, shapes)):
        raise ValueError(f"{config.judging.model} is of a CLIP of {wanted} features, and {clip_id} has {width}")
    graph, params = split(model)

    @jax.jit
    def compute(params, tensors, pixels):
        return score(tensors, nnx.merge(graph, params).image_features(pixels))

    def read(images):
        scores = clip.compute_in_batches(lambda pixels: compute(params, tensors, pixels), images, preprocess)
        return _labels.read(labels, names, values, scores, exclusive=False)

    of_clip = hash_files(weight_files(find_repository(place, clip.FILES), "model", None))
    weights = {"heads": hash_files([file]), "clip": of_clip}
    return Judge(read, {"name": kind, "model": clip_id, "weights": weights, "classes": list(texts)})


def read_heads(path: str, kind: str, shapes: dict) -> tuple[dict[str, np.ndarray], str]:
    """The tensors of a file of data_tools/convert_judge.py, and the CLIP that they are for. Raises ValueError."""
    remedy = f"make it by python -m data_tools.convert_judge --kind={kind} --source=PUBLISHED --out={kind}.safetensors"
    file = pathlib.Path(path).expanduser()
    if not path or not file.is_file():
        raise ValueError(f"config.judging.model={path!r}: there is no such file, {remedy}")
    try:
        facts, tensors = read_safetensors(file)
    except ValueError as error:
        raise ValueError(f"{error}: {remedy}") from error
    if facts.get("judge") != kind or "clip" not in facts:
        raise ValueError(f"{file} is of {facts.get('judge', 'something else')}: {remedy}")
    check_shapes(tensors, shapes, str(file))
    return tensors, facts["clip"]


def check_shapes(tensors: dict, shapes: dict, place: str):
    """Raises ValueError where tensors are not those of `shapes`, or not finite; all is listed."""
    width, problems = features_of(tensors, shapes), []
    for name, shape in shapes.items():
        wanted = tuple(width if side == "features" else side for side in shape)
        if name not in tensors:
            problems.append(f"no {name}")
        elif tensors[name].shape != wanted:
            problems.append(f"{name} of shape {tensors[name].shape} in place of {shape}")
        elif not np.isfinite(tensors[name]).all():
            problems.append(f"numbers of {name} that are not finite")
    problems += [f"{name}, which is none of it" for name in sorted(tensors.keys() - shapes.keys())]
    if problems:
        raise ValueError(f"{place} has {', '.join(problems)}")


def features_of(tensors: dict, shapes: dict) -> int | None:
    """The width of CLIP's features in the first tensor that has it last."""
    first = next(name for name, shape in shapes.items() if shape[-1:] == ("features",))
    return tensors[first].shape[-1] if first in tensors and tensors[first].ndim else None
