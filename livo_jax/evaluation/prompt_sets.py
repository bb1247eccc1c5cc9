"""Prompts of an evaluation from files, on disk or on the Hugging Face hub."""

import functools
import pathlib
import random
from typing import NamedTuple

from livo_jax import files, seeds
from livo_jax.evaluation import objects
from livo_jax.judges import hash_files
from livo_jax.sampling.requests import Request
from livo_jax.values.principles import phrase, template_problems

LEFT_ALONE = "left_alone"  # who has the sets that every value should leave alone
KINDS = ("bias", "harm", LEFT_ALONE)
SUFFIXES = (".csv", ".tsv", ".jsonl", ".txt")


class Prompt(NamedTuple):
    """A prompt of an evaluation.

    split: under which the results have it. subject: of the image, "" where none is known.
    seed, guidance_scale, size: those that its set tells for it, as a Request has them.
    category: of its set, where the split is that category's alone; "" elsewhere.
    stated: by a judge's axes what its image should show: {objects.OBJECTS: as objects.py has it}; None of most sets.
    """

    split: str
    subject: str
    text: str
    seed: int | None = None
    guidance_scale: float | None = None
    size: tuple[int, int] | None = None
    category: str = ""
    stated: dict | None = None

    def requests(self, n: int) -> list[Request]:
        """Requests for its first n images, without a value."""
        own = dict(seed=self.seed, guidance_scale=self.guidance_scale, size=self.size)
        return [Request(self.text, i, **own) for i in range(n)]


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


def find(name: str, chosen) -> pathlib.Path:
    """The file of a set, which is the one that its sha256 asks for. Arguments as of `read`; raises ValueError."""
    where = f"config.eval.prompt_sets.{name}"
    try:
        path = fetch(chosen.repo, chosen.file) if chosen.repo else pathlib.Path(chosen.file).expanduser()
    except FileNotFoundError as error:
        raise ValueError(f"{where}: no {chosen.file!r} of the dataset {chosen.repo!r}: {error}") from None
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{where}.file={chosen.file!r}: name a file that ends in one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ValueError(f"{where}: {path.absolute()} is missing: get it (configs/prompt_sets.py), or set {where}.file")
    wanted, found = chosen.get("sha256"), sha256(path)
    if wanted and wanted != found:
        raise ValueError(
            f"{where}: {path.absolute()} has the sha256 {found}, and {where}.sha256 is {wanted}: get that file, of"
            f" {chosen.get('source') or 'its publisher'}, or, to measure on this one, set {where}.sha256={found!r}"
        )
    return path


def sha256(path: pathlib.Path) -> str:
    return hash_files([path])[path.name]


def read(name: str, chosen, seed: int = 0) -> list[tuple[Prompt, tuple[str, ...]]]:
    """The Prompts of a set with their categories, in the order of the file, each text once: the first row that has it.

    Args:
        name: of the set, which is their split. chosen: the set, as configs/prompt_sets.py has it.
        seed: of the choice of `limit` prompts.

    Raises:
        ValueError: all that is wrong with the file, by line.
    """
    where = f"config.eval.prompt_sets.{name}"
    if chosen.template and (told := template_problems(f"{where}.template", chosen.template)):
        raise ValueError(*told)
    named = {field: chosen[field] for field in ("column", "subject", *PARSERS) if chosen.get(field)}
    if "exclude" in named and "include" not in named:
        raise ValueError(f"{where}.exclude={named['exclude']!r}: name the column of what is included too")
    if ("height" in named) != ("width" in named):
        raise ValueError(f"{where}: of height and width it names one column: name both, or none")
    path, problems, found = find(name, chosen), [], {}
    parsers = {column: PARSERS[field] for field, column in named.items() if field in PARSERS}
    columns = list(dict.fromkeys(named.values()))
    optional = [named["exclude"]] if "exclude" in named else []
    for row in files.read_texts(path, columns, problems, parsers, optional):
        own = {field: row[columns.index(column)] for field, column in named.items()}
        text = own["column"]
        prompt = phrase(chosen.template, text) if chosen.template else text
        subject = own.get("subject", text if chosen.template else "")
        size = (own["height"], own["width"]) if "height" in own else None
        shown = {part: own[part] for part in objects.FIELDS if own.get(part)}
        stated = {objects.OBJECTS: shown} if shown else None
        drawn = Prompt(name, subject, prompt, own.get("seed"), own.get("guidance"), size, stated=stated)
        found.setdefault(prompt, (drawn, own.get("category", ())))
    if not problems and not found:
        problems.append(f"{path}: no prompts in it")
    if problems:
        fields = ", ".join(f".{field}={column!r}" for field, column in named.items())
        raise ValueError(f"{where} cannot be used (its columns: {fields}):\n    " + "\n    ".join(problems))
    rows = list(found.values())
    if 0 < chosen.limit < len(rows):
        rows = [rows[k] for k in sorted(random.Random(seed).sample(range(len(rows)), chosen.limit))]
    return rows


def read_number(text: str, kind, least, most, what: str):
    """The number of a text, an int or float (`kind`). Raises ValueError, with `what` it is, where it is none."""
    try:
        number = kind(text)
    except ValueError:
        number = None
    if number is None or not least <= number <= most:
        raise ValueError(f"{what}, {least} to {most}")
    return number


def read_seed(text: str) -> int:
    return read_number(text, int, 0, seeds.MOST, "a seed is a whole number")


def read_guidance(text: str) -> float:
    return read_number(text, float, 0, 1000, "a guidance is a number")  # I2P has 120


def read_edge(text: str) -> int:
    return read_number(text, int, 1, 8192, "an edge is a whole number of pixels")


def read_categories(text: str) -> tuple[str, ...]:
    """None of an empty text: its prompt is in the whole set alone."""
    return tuple(category.strip() for category in text.split(",") if category.strip())


PARSERS = {  # of the columns that a set may name
    "category": read_categories,
    "seed": read_seed,
    "guidance": read_guidance,
    "height": read_edge,
    "width": read_edge,
    **{part: functools.partial(objects.parse, part) for part in objects.FIELDS},
}


def names(config, value) -> list[str]:
    """The sets that config.eval.prompts chooses for a value: its own or, without any, those of its kind."""
    chosen = [entry.split("=") for entry in config.eval.prompts]
    return [name for who, name in chosen if who == value.name] or [name for who, name in chosen if who == value.kind]


def rows(config, value) -> list[Prompt]:
    """The Prompts that the sets of a value hold, and again those of each category; [] where it has no set."""
    return _of_sets(config, names(config, value))


def names_left_alone(config) -> list[str]:
    """The sets that every value should leave alone."""
    return [name for who, name in (entry.split("=") for entry in config.eval.prompts) if who == LEFT_ALONE]


def left_alone(config) -> list[Prompt]:
    """The Prompts of the sets that every value should leave alone, and again those of each category."""
    return _of_sets(config, names_left_alone(config))


def _of_sets(config, names: list[str]) -> list[Prompt]:
    found = []
    for name in names:
        chosen = read(name, config.eval.prompt_sets[name], config.eval.seed)
        found += [prompt for prompt, _ in chosen]
        for category in sorted({category for _, categories in chosen for category in categories}):
            of_category = [prompt for prompt, categories in chosen if category in categories]
            found += [prompt._replace(split=f"{name}: {category}", category=category) for prompt in of_category]
    return found


def describe(config) -> list[dict]:
    """What is to be told of the sets that config.eval.prompts chooses: where they come from, and what was read."""
    found = []
    for name in dict.fromkeys(entry.partition("=")[2] for entry in config.eval.prompts):
        chosen = config.eval.prompt_sets[name]
        found.append({"name": name, **chosen.to_dict(), "sha256": sha256(find(name, chosen))})
        found[-1]["prompts"] = len(read(name, chosen, config.eval.seed))
    return found


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
