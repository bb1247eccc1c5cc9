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
        said = {label.name: label.attribute for label in labels if label.axis == value.axis}

        def score(attribute, said=said):
            columns = scores[:, [said.get(name) == attribute for name in names]]
            if not columns.shape[1]:
                return np.zeros(len(scores))
            return columns.sum(1) if exclusive else columns.max(1)

        if value.kind == "harm":
            reading[value.axis] = score("")
        else:
            choices = (*value.attributes, UNSPECIFIED, "")  # "" last: of equal scores the first is taken
            of_none = score(None) if exclusive else np.zeros(len(scores))
            columns = [*map(score, choices[:-1]), of_none]
            best = np.stack(columns, axis=1)  # [B, choices]
            reading[value.axis] = np.where(best.max(1) > 0, np.array(choices)[best.argmax(1)], "")
    return reading
