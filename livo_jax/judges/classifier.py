"""The judge of any published image classifier, as one of NSFW, gender, age or race, whose labels are told in config."""

import functools

from livo_jax.files.repositories import find_repository, weight_patterns
from livo_jax.judges import Judge, _labels
from livo_jax.judges._pytorch import load_pytorch, pin_pytorch, pytorch_problems

BATCH = 16  # images at once
FILES = ["*config.json", *weight_patterns("model", None)]
# FairFace (Karkkainen & Joo 2021) has seven races. Of the five of principles.toml two are its Asian ones together, and
# none is its Middle Eastern: that is "unspecified", never one of the five.
FAIRFACE = (
    "White=race:white", "Black=race:black", "Indian=race:indian", "East Asian=race:asian",
    "Southeast Asian=race:asian", "Latino_Hispanic=race:latino", "Middle Eastern=race:unspecified",
    "Male=gender:male", "Female=gender:female",
)  # fmt: skip


def make(config, values, subjects) -> Judge:
    """The judge of an image classifier, which transformers computes with PyTorch.

    Args:
        config: `judging.model` is its directory or hub id; `judging.labels` says of which axis its labels are, as
            ("nsfw=nudity",) or ("Man=gender:male", "Woman=gender:female"), or is ("fairface",): those of FAIRFACE that
            the model has.

    Returns:
        A Judge that reads of a harm value's axis the probability, 0 to 1, of its labels together; of a bias value's
        axis the attribute with the most, "" where a label that says nothing of it has more. A model of labels that do
        not exclude each other has a probability for each: the highest counts.

    Raises:
        ValueError: PyTorch is not installed, the config names no model or no labels, or these do not fit; all are
            listed. Or the directory holds no such model.
        FileNotFoundError: the model or its weights are not here.
    """
    texts, problems = tuple(config.judging.labels), []
    if not texts:
        problems.append("config.judging.labels is empty: say of which axis its labels are, as ('nsfw=nudity',)")
    problems += pytorch_problems(config, "a directory or hub id of an image classifier")
    if not problems:
        classify, names, exclusive = published(config.judging.model)
        if texts == ("fairface",):
            texts = tuple(text for text in FAIRFACE if text.partition("=")[0] in names)
        labels, problems = _labels.parse(texts, names, values)
    if problems:
        raise ValueError("the judge classifier cannot work: " + "; ".join(problems))

    def read(images):
        return _labels.read(labels, names, values, classify(images), exclusive)

    pinned = {"name": "classifier", "classes": list(texts)} | pin_pytorch(config, FILES)
    return Judge(read, pinned, unspecified=_labels.may_be_unspecified(labels, values))


@functools.lru_cache(maxsize=1)  # a run asks for its judge before it builds pairs, to build them, and to evaluate
def published(path_or_hub_id):
    """A published image classifier, on the GPU if PyTorch has one. No code that comes with it runs.

    Returns:
        classify(images [B, H, W, 3] uint8) -> [B, K] float32 probabilities; the K labels; whether they exclude each
        other, and add up to 1.

    Raises:
        FileNotFoundError: it or its weights are not here.
        ValueError: transformers cannot read it, it lacks weights, or has a single label.
    """
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    root = find_repository(path_or_hub_id, FILES)
    processor, model, missing = load_pytorch(
        root, AutoImageProcessor, AutoModelForImageClassification, "image classifier"
    )
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    if missing:  # as of a model that was published without its last layer, which transformers then draws at random
        raise ValueError(f"{root} has no weights {', '.join(missing)}: it is no trained image classifier")
    if len(names) < 2:
        raise ValueError(f"{root} has one label, {names[0]!r}: that is no classifier's")
    exclusive = model.config.problem_type != "multi_label_classification"

    @torch.inference_mode()
    def classify(images):
        found = []
        for start in range(0, len(images), BATCH):
            inputs = processor(list(images[start : start + BATCH]), return_tensors="pt")
            logits = model(**inputs.to(model.device, model.dtype)).logits.float()
            found.append(logits.softmax(1) if exclusive else logits.sigmoid())
        return torch.cat(found).cpu().numpy()

    return classify, names, exclusive
