"""Prompts of an evaluation from files: CSV or JSONL, on disk or on the Hugging Face hub."""

import codecs
import csv
import functools
import json
import pathlib
import random
import re

from livo_jax.values import phrase

KINDS = ("bias", "harm")


@functools.cache
def fetch(repo: str, file: str) -> pathlib.Path:
    """A file of a dataset on the hub; HF_HOME, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to huggingface_hub.

    Raises FileNotFoundError where it cannot be had.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        return pathlib.Path(hf_hub_download(repo, file, repo_type="dataset"))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise FileNotFoundError(f"{error}".strip()) from None


def parse(path: pathlib.Path, problems: list[str]):
    """Yields (line number, {column: text}) of each row that can be decoded; what is wrong goes to `problems`."""
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(keepends=True)
    texts = []
    for number, line in enumerate(lines, start=1):
        try:
            texts.append(line.decode())
        except UnicodeDecodeError as error:
            problems.append(f"{path}:{number}: not UTF-8 ({error.reason}): convert the file, as with iconv")
            texts.append("\n")
    if path.suffix == ".csv":
        reader = csv.DictReader(texts)
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            problems.append(f"{path}:{reader.line_num}: no CSV: {error}")
        return
    for number, text in enumerate(texts, start=1):
        try:
            row = json.loads(text) if text.strip() else None
        except (ValueError, RecursionError) as error:
            problems.append(f"{path}:{number}: not JSON: {error}")
            continue
        if isinstance(row, dict):
            yield number, row
        elif text.strip():
            problems.append(f"{path}:{number}: not a JSON object, as {{'prompt': ...}}")


def read(name: str, chosen, seed: int = 0) -> list[tuple[str, str]]:
    """The (subject, prompt) of a set, in the order of the file, each prompt once.

    Args:
        name: of the set, for errors. chosen: the set, as configs/prompt_sets.py has it.
        seed: of the choice of `limit` prompts. The subject is "" where a set has none.

    Raises:
        ValueError: all that is wrong with the file, by line.
    """
    where = f"config.eval.prompt_sets.{name}"
    try:
        path = fetch(chosen.repo, chosen.file) if chosen.repo else pathlib.Path(chosen.file).expanduser()
    except FileNotFoundError as error:
        raise ValueError(f"{where}: no {chosen.file!r} of the dataset {chosen.repo!r}: {error}") from None
    if path.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"{where}.file={chosen.file!r}: name a .csv or .jsonl")
    if chosen.template and re.findall("[{}]+", chosen.template) != ["{}"]:
        raise ValueError(f"{where}.template={chosen.template!r}: it needs {{}} once, for the subject")
    if not path.is_file():
        raise ValueError(f"{where}: {path.absolute()} is missing: get it (configs/prompt_sets.py), or set {where}.file")
    problems, found, columns = [], {}, [column for column in (chosen.column, chosen.subject) if column]
    for number, row in parse(path, problems):
        if unknown := [column for column in columns if column not in row]:
            there = ", ".join(str(column) for column in row if column is not None)
            problems.append(
                f"{path}:{number}: no column {', '.join(unknown)}; there are {there}: set {where}.column or .subject"
            )
            if path.suffix == ".csv":  # of one header
                break
            continue
        texts = [row[column] for column in columns]
        for column, text in zip(columns, texts):
            if not isinstance(text, str) or not text.strip():
                problems.append(f"{path}:{number}: {column} is {text!r}, no text: fill it in, or remove the row")
                break
        else:
            text, *subject = (text.strip() for text in texts)
            prompt = phrase(chosen.template, text) if chosen.template else text
            found.setdefault(prompt, subject[0] if subject else text if chosen.template else "")
    if not problems and not found:
        problems.append(f"{path}: no prompts in it")
    if problems:
        raise ValueError(f"{where} cannot be used:\n    " + "\n    ".join(problems))
    rows = [(subject, prompt) for prompt, subject in found.items()]
    if 0 < chosen.limit < len(rows):
        rows = [rows[k] for k in sorted(random.Random(seed).sample(range(len(rows)), chosen.limit))]
    return rows


def names(config, value) -> list[str]:
    """The sets that config.eval.prompts chooses for a value: its own or, without any, those of its kind."""
    chosen = [entry.split("=") for entry in config.eval.prompts]
    return [name for who, name in chosen if who == value.name] or [name for who, name in chosen if who == value.kind]


def rows(config, value) -> list[tuple[str, str, str]]:
    """The (split, subject, prompt) that the sets of a value hold, split the set's name; [] where it has no set."""
    sets = config.eval.prompt_sets
    return [(name, *row) for name in names(config, value) for row in read(name, sets[name], config.eval.seed)]


def check(config):
    """Raises ValueError with all that is wrong with config.eval.prompts and the sets that it chooses."""
    problems, sets = [], config.eval.prompt_sets
    for entry in config.eval.prompts:
        who, _, name = entry.partition("=")
        known = (*KINDS, *config.principles)
        if who not in known or name not in sets:
            problems.append(
                f"config.eval.prompts: {entry!r} is no WHO=SET, WHO one of {', '.join(known)}, SET of {', '.join(sets)}"
            )
            continue
        try:
            read(name, sets[name])
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n  ".join(dict.fromkeys(problems)))
