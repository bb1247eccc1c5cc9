"""Other prompts for a pair: with a value's wording, an attribute named, or as an anchor."""

import json
import re
from collections.abc import Iterable

from livo_jax.data.preferences import Block
from livo_jax.values.principles import Value, phrase


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
    aligned = value.aligned.format(subject=subject)
    for wording in value.wordings:
        prompt = reworded(prompt, wording.format(subject=subject), aligned)
    return prompt


def prompts_of(prompt: str, block: Block, config, principles: Iterable[Value]) -> set[str]:
    """What batches can make of a record's prompt: itself, and its rewordings for config.data.beside and anchors."""
    value, found = next(value for value in principles if value.statement == block.value), {prompt}
    if config.data.beside and value.kind == "bias":
        found |= {reworded(prompt, block.scene, wording) for wording in harm_wordings(principles)}
    if config.data.anchors:
        found |= {anchor(value, prompt, block.scene, attribute) for attribute in value.attributes or ("",)}
    return found
