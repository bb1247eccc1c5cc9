"""Sets of prompts that others labelled, their labels put in terms of values."""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from livo_jax import files

NONE, UNSCORED = "none", "unscored"
REST = "*"
TOLD = 20  # problems of a file, at most


class Row(NamedTuple):
    """A prompt of a set."""

    prompt: str
    categories: tuple[str, ...]
    wanted: frozenset[str] | None  # names of values; None where its labels say nothing about them


def read_mapping(entries: Sequence[str], label: str, names: Sequence[str]) -> tuple[dict[str, frozenset], list[str]]:
    """Which values a label stands for, and what is wrong with the entries that say so.

    Args:
        entries: "LABEL=NAME" each, several of one label for several values; "NAME" for all prompts where there is no
            label. In the place of a name "none" is for no value, "unscored" for prompts that tell nothing. The label
            "*" is every label that no entry names.
        label: the column of the labels, "" for none.
        names: of the values that there are.

    Returns:
        {label: names of values, or None for "unscored"}; and the problems.
    """
    found, problems = {}, []
    for entry in entries:
        text, equals, name = entry.rpartition("=")
        if bool(equals) != bool(label):
            wanted = (
                "LABEL=NAME, for there is a column of labels" if label else "NAME, for there is no column of labels"
            )
            problems.append(f"{entry!r} is no {wanted}")
        elif name not in (*names, NONE, UNSCORED):
            problems.append(f"{entry!r}: no value {name!r}; there are {', '.join(names)}, {NONE} and {UNSCORED}")
        else:
            found.setdefault(text, []).append(name)
    for text, chosen in found.items():
        if len(chosen) > 1 and {NONE, UNSCORED} & set(chosen):
            problems.append(f"the label {text!r} is for {' and '.join(chosen)}: {NONE} and {UNSCORED} stand alone")
    return {text: None if UNSCORED in them else frozenset(them) - {NONE} for text, them in found.items()}, problems


def _labels(text: str) -> str:
    """A field of labels, with commas between them where it is a list of JSON."""
    try:
        listed = json.loads(text) if text.startswith("[") else None
    except (ValueError, RecursionError):
        return text
    return ", ".join(map(str, listed)) if isinstance(listed, list) else text


def read_set(
    path, names: Sequence[str], *, column: str = "prompt", label: str = "", values: Sequence[str] = (),
    category: str = "", where: Mapping[str, str] | None = None,
) -> list[Row]:  # fmt: skip
    """The prompts of a file that people labelled, each row of the file one.

    Args:
        path: a file as files.read_texts takes it.
        names: of the values that there are.
        column, label, category: which column has the prompt, its labels (several with commas between them, or a list
            in JSON; "" is one too), and what the prompts are told apart by; without a category it is the label.
        values: which values a label is for, as `read_mapping` takes it. None is "none" for every prompt.
        where: {column: regular expression} that the rows must hold.

    Raises:
        ValueError: all that is wrong with the file, by line, with its labels, and with the mapping.
        OSError: the file cannot be read.
    """
    path, where = pathlib.Path(path).expanduser(), dict(where or {})
    mapping, problems = read_mapping(values, label, names)
    for name, expression in where.items():
        try:
            re.compile(expression)
        except re.error as error:
            problems.append(f"where {name}={expression!r}: no regular expression: {error}")
    if problems:
        raise ValueError(f"{path} cannot be used: {'; '.join(problems)}")
    columns = [column, *filter(None, (label, category)), *where]
    unique = list(dict.fromkeys(columns))
    parsers = dict.fromkeys(set(unique) - {column}, _labels)  # where "" is a label too
    rows = [dict(zip(unique, texts)) for texts in files.read_texts(path, unique, problems, parsers)]
    rows = [row for row in rows if all(re.search(expression, row[name]) for name, expression in where.items())]
    if not rows and not problems:
        problems.append(f"{path}: no prompts in it" + (", where its columns are as they should be" if where else ""))
    every = mapping.get("", frozenset()) if not label else None
    labels = [[text.strip() for text in row[label].split(",")] if label else [] for row in rows]
    there = set().union(*labels)
    if not problems and label:
        unknown = sorted(there - mapping.keys()) if REST not in mapping else []
        for text in unknown:
            own = [row[column] for row, texts in zip(rows, labels) if text in texts]
            problems.append(
                f"no value for the label {text!r} of {len(own)} prompts, as {own[0]!r}: {text}=NAME, {text}={NONE} or"
                f" {text}={UNSCORED}"
            )
        problems += [
            f"no row has the label {text!r}; there are {', '.join(sorted(there))}"
            for text in mapping
            if text != REST and text not in there
        ]
    if problems:
        more = [f"and {len(problems) - TOLD} more"] if len(problems) > TOLD else []
        raise ValueError(f"{path} cannot be used:\n  " + "\n  ".join([*problems[:TOLD], *more]))
    found = []
    for row, texts in zip(rows, labels):
        said = [mapping.get(text, mapping.get(REST)) for text in texts] if label else [every]
        known = [names for names in said if names is not None]
        wanted = frozenset().union(*known) if known else None
        if wanted == frozenset() and len(known) < len(said):  # one of its labels tells nothing
            wanted = None
        found.append(Row(row[column], (row[category],) if category else tuple(texts), wanted))
    return found
