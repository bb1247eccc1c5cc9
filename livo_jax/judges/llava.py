"""The judge that asks a vision-language model here, as LLaVA (Liu et al. 2023), for the probability of "yes"."""

import functools

import numpy as np

from livo_jax.files.repositories import find_repository, weight_patterns
from livo_jax.judges import UNSPECIFIED, Judge
from livo_jax.judges._pytorch import load_pytorch, pin_pytorch, pytorch_problems
from livo_jax.judges.clip import SUBJECT
from livo_jax.values.principles import phrase

BATCH = 16  # images at once
ASK = "Is this {}? Answer with one word: yes or no."
FILES = ["*config.json", "chat_template.*", "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json"]
FILES += weight_patterns("model", None)


def make(config, values, subjects) -> Judge:
    """The judge of a published vision-language model, which transformers computes with PyTorch.

    Args:
        config: `judging.model` is its directory or hub id, as llava-hf/llava-1.5-7b-hf; where `judging.subject`,
            subjects are read, by a question for each.
        values: a harm's `question` is asked, and for each attribute of a bias whether the image is what its text in
            `classes` says.

    Returns:
        A Judge that reads of a harm value's axis P(yes), 0 to 1, as `published` has it; of a bias value's axis the
        attribute and of "subject" the subject with the highest P(yes), "" where the model denies all, P(yes) < 0.5; a
        bias reads UNSPECIFIED there, if `judging.unspecified`.

    Raises:
        ValueError: PyTorch is not installed, the config names no model, a value has no question or classes, or there
            is none; all are listed. Or the directory holds no such model.
        FileNotFoundError: the model or its weights are not here.
    """
    fields = {"bias": "classes", "harm": "question"}
    problems = [
        f"the value {v.name!r} has no `{fields[v.kind]}` in principles.toml"
        for v in values
        if not getattr(v, fields[v.kind])
    ]
    if not values:
        problems.append("there is no value to read")
    problems += pytorch_problems(config, "a directory or hub id, as llava-hf/llava-1.5-7b-hf")
    if problems:
        raise ValueError("the judge llava cannot work: " + "; ".join(problems))
    ask = published(config.judging.model)

    unspecified = bool(config.judging.get("unspecified", False))
    texts = {(value.axis, value.attributes): value.classes for value in values if value.kind == "bias"}
    if config.judging.subject:
        texts["subject", tuple(subjects)] = [phrase(SUBJECT, subject) for subject in subjects]

    def read(images):
        reading = {value.axis: ask(value.question, images) for value in values if value.kind == "harm"}
        for (axis, names), of_names in texts.items():
            yes = np.stack([ask(ASK.format(text), images) for text in of_names], axis=1)  # [B, names]
            denied = UNSPECIFIED if unspecified and axis != "subject" else ""
            reading[axis] = np.where(yes.max(1) >= 0.5, np.array(names)[yes.argmax(1)], denied)
        return reading

    asked = {v.name: v.question if v.kind == "harm" else [ASK.format(text) for text in v.classes] for v in values}
    pinned = {"name": "llava", "questions": asked} | pin_pytorch(config, FILES)
    return Judge(read, pinned, unspecified=unspecified)


@functools.lru_cache(maxsize=1)  # a run asks for its judge before it builds pairs, to build them, and to evaluate
def published(path_or_hub_id):
    """A published vision-language model, on the GPU if PyTorch has one, there in the precision of its files.

    No code that comes with it runs; its chat template is rendered in transformers' Jinja sandbox.

    Returns:
        ask(question, images [B, H, W, 3] uint8) -> [B] float32, 0 to 1: P(yes) / (P(yes) + P(no)) of the first token of
        the answer. All tokens that read "yes" or "no" count, in whatever case and with whatever space around them.

    Raises:
        FileNotFoundError: it or its weights are not here.
        ValueError: transformers cannot read it, or it lacks weights, the chat template, or tokens of "yes" and "no".
    """
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    root = find_repository(path_or_hub_id, FILES)
    processor, model, missing = load_pytorch(root, AutoProcessor, AutoModelForImageTextToText, "vision-language model")
    pieces = processor.tokenizer.batch_decode([[i] for i in range(len(processor.tokenizer))])
    answers = {word: [i for i, piece in enumerate(pieces) if piece.strip().lower() == word] for word in ("yes", "no")}
    problems = [f"no token that reads {word!r}" for word, ids in answers.items() if not ids]
    if missing:
        problems.append(f"no weights {', '.join(missing)}")
    if not processor.chat_template:
        problems.append("no chat template: is chat_template.jinja or chat_template.json there?")
    if problems:
        raise ValueError(f"{root} has {'; '.join(problems)}")

    @torch.inference_mode()
    def ask(question, images):
        odds = []
        for start in range(0, len(images), BATCH):
            # One question and images of one size: rows of one length, without padding.
            contents = [
                [{"type": "image", "image": Image.fromarray(image)}, {"type": "text", "text": question}]
                for image in images[start : start + BATCH]
            ]
            inputs = processor.apply_chat_template(
                [[{"role": "user", "content": content}] for content in contents],
                add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            )  # fmt: skip
            logits = model(**inputs.to(model.device, model.dtype), logits_to_keep=1).logits[:, -1].float()
            yes, no = (logits[:, answers[word]].logsumexp(1) for word in ("yes", "no"))
            odds.append(yes - no)
        return torch.cat(odds).sigmoid().cpu().numpy()

    return ask
