"""Prompts of an evaluation from files, on disk or on the Hugging Face hub."""

import functools
import pathlib
import random
import re

from livo_jax import files
from livo_jax.values.principles import phrase

KINDS = ("bias", "harm")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".txt")


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
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{where}.file={chosen.file!r}: name a file that ends in one of {', '.join(SUFFIXES)}")
    if chosen.template and re.findall("[{}]+", chosen.template) != ["{}"]:
        raise ValueError(f"{where}.template={chosen.template!r}: it needs {{}} once, for the subject")
    if not path.is_file():
        raise ValueError(f"{where}: {path.absolute()} is missing: get it (configs/prompt_sets.py), or set {where}.file")
    problems, found = [], {}
    columns = [column for column in (chosen.column, chosen.subject) if column]
    for text, *subject in files.read_texts(path, columns, problems):
        prompt = phrase(chosen.template, text) if chosen.template else text
        found.setdefault(prompt, subject[0] if subject else text if chosen.template else "")
    if not problems and not found:
        problems.append(f"{path}: no prompts in it")
    if problems:
        fields = f"its columns are {where}.column={chosen.column!r} and .subject={chosen.subject!r}"
        raise ValueError(f"{where} cannot be used ({fields}):\n    " + "\n    ".join(problems))
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
