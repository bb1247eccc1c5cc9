"""What the rows of pairs read: the prompt, the value, and a second value beside it."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from livo_jax.data.rewording import anchor, harm_wordings, other_wordings, reworded, shows
from livo_jax.values.principles import Value, attributed


class Texts(NamedTuple):
    """Of a pair.

    prompt: what the model reads. value: what the value encoder reads. beside: the same of a second value, None where
    pairs have none; stands_beside: whether it stands beside the first. anchor: whether the prompt is one that the value
    should leave alone, harm: whether the value is one; None where pairs have no anchors. exchanged: whether the images
    change their parts.
    """

    prompt: str
    value: str
    beside: str | None
    stands_beside: bool | None
    anchor: bool | None
    harm: bool | None
    exchanged: bool


@dataclasses.dataclass
class PairTexts:
    """Draws the texts of pairs. The fields are arguments of data.batches.batches.

    The value encoder reads `address` of a value and of the prompt as it is now: as where images are drawn.
    """

    principles: tuple[Value, ...]
    beside: float
    attributes: float
    anchors: float
    concepts: bool
    address: Callable[[str, str], str]

    def draw(self, rng: np.random.Generator, scene: str, record: dict, partner: Callable[[], dict]) -> Texts:
        """The texts of a record and its partner, which is read where it matters what both show."""
        own_prompt, statement = record["prompt"].decode(), record["value"].decode()
        value = next((value for value in self.principles if value.statement == statement), None)
        prompt, second, stands_beside = self.draw_second(rng, scene, own_prompt, value)

        anchored = self.anchors and rng.random() < self.anchors and prompt == own_prompt
        named = self.attributes and not anchored and rng.random() < self.attributes
        shown = shows(record, partner()) if anchored or named else None
        exchanged = bool(shown and rng.random() < 1 / len(value.attributes))
        attribute = shown[exchanged] if shown else ""
        before = prompt
        if anchored and (attribute or value.kind == "harm"):
            own, *others = other_wordings(value, self.principles)
            wording = str(rng.choice(others)) if others and rng.random() < 0.5 else own
            prompt = anchor(value, prompt, scene, attribute, wording)
        if named and attribute:
            statement = attributed(statement, attribute)

        is_anchor, is_harm = (prompt != before, value.kind == "harm") if self.anchors else (None, None)
        beside = self.address(second, prompt) if second else None
        if self.concepts:
            concept, prompt = self.draw_concept(rng, scene, prompt, value)
            return Texts(prompt, concept, beside, stands_beside, is_anchor, is_harm, exchanged)
        return Texts(prompt, self.address(statement, prompt), beside, stands_beside, is_anchor, is_harm, exchanged)

    def draw_second(self, rng, scene: str, prompt: str, value: Value) -> tuple[str, str, bool | None]:
        """The prompt, the statement of a second value ("" where pairs have none), and whether it stands beside.

        Beside a harm a bias's prompt is worded harmfully.
        """
        if not self.beside or len(self.principles) < 2:
            return prompt, "", None
        second = self.principles[rng.choice([i for i, other in enumerate(self.principles) if other is not value])]
        stands = rng.random() < self.beside
        if stands and (value.kind, second.kind) == ("bias", "harm"):
            prompt = reworded(prompt, scene, rng.choice(second.wordings))
        if second.attributes and rng.random() < self.attributes:  # it may be any token that can stand there
            return prompt, attributed(second.statement, rng.choice(second.attributes)), stands
        return prompt, second.statement, stands

    def draw_concept(self, rng, scene: str, prompt: str, value: Value) -> tuple[str, str]:
        """The prompt of a harm's concept, and that of its anchor."""
        if value.kind == "harm":
            return prompt, anchor(value, prompt, scene)
        return reworded(prompt, scene, rng.choice(harm_wordings(self.principles))), prompt
