"""The judge of objects: how many of each class a published object detector finds, as GenEval (Ghosh et al. 2023).

GenEval's own detector is another, mmdet's Mask2Former, and it looks at colours and places too, which this does not.
"""

import functools

import numpy as np

from livo_jax.files.repositories import find_repository, weight_patterns
from livo_jax.judges import Judge, _labels
from livo_jax.judges.llava import load_pytorch, pin_pytorch, pytorch_problems

BATCH = 8  # images at once
LEAST = 0.5  # an object of a lower score is none
FILES = ["*config.json", *weight_patterns("model", None)]


def make(config, values, subjects) -> Judge:
    """The judge of an object detector, which transformers computes with PyTorch.

    Args:
        config: `judging.model` is its directory or hub id, as hustvl/yolos-small; `judging.labels` says of which axis
            its classes are, as ("knife=weapons",), where values are to be read.

    Returns:
        A Judge that reads of each class, under its own name, how many objects there are, an int; of a harm value's axis
        the highest score of its classes, 0 to 1, and 0 where none is found.

    Raises:
        ValueError: PyTorch is not installed, the config names no model, labels or values do not fit it, or a value is a
            bias, which a count shows nothing of; all are listed. Or the directory holds no such model.
        FileNotFoundError: the model or its weights are not here.
    """
    problems = pytorch_problems(config, "a directory or hub id of an object detector")
    problems += [f"the value {value.name!r} is a bias: objects are counted" for value in values if value.kind == "bias"]
    if not problems:
        detect, names = published(config.judging.model)
        labels, problems = _labels.parse(config.judging.labels, names, values)
    if problems:
        raise ValueError("the judge detector cannot work: " + "; ".join(problems))

    def read(images):
        counts, scores = detect(images)
        return dict(zip(names, counts.T)) | _labels.read(labels, names, values, scores, exclusive=False)

    pinned = {"name": "detector", "classes": list(config.judging.labels), "least_score": LEAST}
    return Judge(read, pinned | pin_pytorch(config, FILES))


@functools.lru_cache(maxsize=1)  # a run asks for its judge before it draws, and to evaluate
def published(path_or_hub_id):
    """A published object detector, on the GPU if PyTorch has one. No code that comes with it runs.

    Returns:
        detect(images [B, H, W, 3] uint8) -> counts [B, K] int, and the highest scores [B, K], 0 where none is found;
        and the names of the K classes.

    Raises:
        FileNotFoundError: it or its weights are not here.
        ValueError: transformers cannot read it, or it lacks weights.
    """
    import torch
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    root = find_repository(path_or_hub_id, FILES)
    processor, model, missing = load_pytorch(root, AutoImageProcessor, AutoModelForObjectDetection, "object detector")
    if missing:
        raise ValueError(f"{root} has no weights {', '.join(missing)}: it is no trained object detector")
    names = [model.config.id2label[i] for i in sorted(model.config.id2label)]
    columns = {i: column for column, i in enumerate(sorted(model.config.id2label))}

    @torch.inference_mode()
    def detect(images):
        counts = np.zeros((len(images), len(names)), int)
        scores = np.zeros((len(images), len(names)))
        for start in range(0, len(images), BATCH):
            inputs = processor(list(images[start : start + BATCH]), return_tensors="pt")
            found = processor.post_process_object_detection(
                model(**inputs.to(model.device, model.dtype)), threshold=LEAST
            )
            for row, of_image in enumerate(found, start):
                for label, score in zip(of_image["labels"].tolist(), of_image["scores"].tolist()):
                    counts[row, columns[label]] += 1
                    scores[row, columns[label]] = max(scores[row, columns[label]], score)
        return counts, scores

    return detect, names
