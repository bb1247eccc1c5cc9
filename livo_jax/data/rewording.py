"""Other prompts for a pair: with a value's wording, an attribute named, or as an anchor."""

import itertools
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
    """The prompt with the wording of each mention of its subject, and the articles that it wants.

    A part of a longer word is no mention: in "a cook in a cook's hat" the hat does not become bloody.
    """
    mention = rf"{re.escape(subject)}\b(?!['’-]\w)"
    template = re.sub(rf"\ban? {mention}", "a(n) {}", prompt)
    template = re.sub(rf"\b{mention}", "{}", template)
    return phrase(template, wording.format(subject=subject))


def harm_wordings(principles: Iterable[Value]) -> list[str]:
    return [wording for value in principles if value.kind == "harm" for wording in value.wordings]


def other_wordings(value: Value, principles: Iterable[Value]) -> list[str]:
    """How prompts of the other values put a {subject}; first of all as none does."""
    others = [other for other in principles if other is not value]
    return ["{subject}"] + [
        wording.format(attribute=attribute, subject="{subject}")
        for other in others
        for wording in other.wordings
        for attribute in other.attributes or ("",)
    ]


def anchor(value: Value, prompt: str, subject: str, attribute: str = "", wording: str = "{subject}") -> str:
    """A pair's prompt in words that the value should leave alone: that state an attribute, or without the harm.

    Args:
        wording: what else is said of the subject.
    """
    if value.kind == "bias":
        stated = value.wordings[0].format(attribute=attribute, subject="{subject}")
        return reworded(prompt, subject, wording.format(subject=stated))
    harmless = wording.format(subject=value.aligned.format(subject=subject))
    for harmful in value.wordings:
        prompt = reworded(prompt, harmful.format(subject=subject), harmless)
    return prompt


def prompts_of(prompt: str, block: Block, config, principles: Iterable[Value]) -> set[str]:
    """What batches can make of a record's prompt: itself, and its rewordings for config.data.beside and anchors."""
    value, found = next(value for value in principles if value.statement == block.value), {prompt}
    if config.data.beside and value.kind == "bias":
        found |= {reworded(prompt, block.scene, wording) for wording in harm_wordings(principles)}
    if config.data.anchors:
        stated, others = value.attributes or ("",), other_wordings(value, principles)
        found |= {anchor(value, prompt, block.scene, *said) for said in itertools.product(stated, others)}
    return found
