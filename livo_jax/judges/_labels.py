"""What the labels of a classifier or detector say of a value's axis: "LABEL=AXIS", of a bias "LABEL=AXIS:ATTRIBUTE"."""

from typing import NamedTuple

import numpy as np

from livo_jax.judges import UNSPECIFIED, Reading


class Label(NamedTuple):
    name: str
    axis: str
    attribute: str  # "" of a harm


def parse(texts, known, values) -> tuple[list[Label], list[str]]:
    """The Labels of texts as the head of this file has them, and what is wrong with them.

    Args:
        known: the labels that there are. values: the Values whose axes are to be read.
    """
    labels, problems = [], []
    for text in texts:
        name, _, place = text.rpartition("=")
        axis, _, attribute = place.partition(":")
        if not (name and axis):
            problems.append(f"config.judging.labels: {text!r} is neither LABEL=AXIS nor LABEL=AXIS:ATTRIBUTE")
        elif name not in known:
            problems.append(f"config.judging.labels: there is no label {name!r}, choose from {', '.join(known)}")
        elif any((name, axis) == label[:2] for label in labels):
            problems.append(f"config.judging.labels: {name!r} is of the axis {axis!r} twice")
        else:
            labels.append(Label(name, axis, attribute))
    axes = sorted({label.axis for label in labels})
    for value in values:
        own = [label for label in labels if label.axis == value.axis]
        wanted = value.attributes if value.kind == "bias" else ("",)
        if not own:
            problems.append(f"the value {value.name!r}: no label is of its axis {value.axis!r}, only of {axes}")
            continue
        for label in own:
            if label.attribute not in (*wanted, UNSPECIFIED) or value.kind == "harm" and label.attribute:
                problems.append(
                    f"config.judging.labels: {label.name!r} is {label.attribute!r}, and the {value.kind}"
                    f" {value.name!r} has {', '.join(value.attributes) or 'no attributes'}"
                )
        if missing := [attribute for attribute in wanted if attribute not in {label.attribute for label in own}]:
            problems.append(f"the value {value.name!r}: no label is {', '.join(map(repr, missing))}")
    return labels, problems


def read(labels: list[Label], names, values, scores, exclusive: bool) -> Reading:
    """What scores say of the values' axes.

    Args:
        names: the label of each column of `scores`, [B, len(names)], 0 to 1.
        exclusive: whether an image has one label alone, as of a softmax: then the scores of labels that say the same
            add up, and labels that say nothing of a bias make it unreadable where they are ahead. Else the highest
            score counts, and a bias cannot be read where no label has any.
    """
    reading = {}
    for value in values:
        attributes = {label.name: label.attribute for label in labels if label.axis == value.axis}
        said = [attributes.get(name) for name in names]  # of each column; None: nothing of this axis
        choices = ("",) if value.kind == "harm" else (*value.attributes, UNSPECIFIED, None)
        by_choice = [combine(scores[:, [each == choice for each in said]], exclusive) for choice in choices]
        best = np.stack(by_choice, axis=1)  # [B, choices]
        if value.kind == "harm":
            reading[value.axis] = best[:, 0]
            continue
        if not exclusive:
            best[:, -1] = 0
        texts = np.array([*value.attributes, UNSPECIFIED, ""])
        reading[value.axis] = np.where(best.max(1) > 0, texts[best.argmax(1)], "")
    return reading


def combine(scores, exclusive: bool) -> np.ndarray:
    """[B] of the scores [B, n] of labels that say the same; 0 of none."""
    return scores.sum(1) if exclusive else scores.max(1, initial=0)


def may_be_unspecified(labels: list[Label], values) -> bool:
    """Whether a label says of a bias that it is unspecified."""
    axes = {value.axis for value in values if value.kind == "bias"}
    return any(label.axis in axes and label.attribute == UNSPECIFIED for label in labels)
