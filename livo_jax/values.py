"""Value principles, the share of images that they are applied to, and the retriever: which prompts they are for."""

import dataclasses
import functools
import pathlib
import re
import tomllib
import warnings
import zlib

from livo_jax import retriever
from livo_jax.dealing import applies

PRINCIPLES = pathlib.Path(__file__).with_name("principles.toml")
# Words that begin with the sound of a vowel: by the letter, but for "one", for u spoken as "you", and for a mute h.
VOWEL = re.compile(
    r"(?!eu|ewe|on(?:e|ce)\b|ubiq|uk|uni[cfloqstv]|ur[aeiou]|us[aeu]|ut[aeio])[aeiou]|hour|honest|honou?r|heir", re.I
)


@dataclasses.dataclass(frozen=True)
class Value:
    """A principle; principles.toml explains the fields."""

    name: str
    statement: str
    kind: str
    axis: str
    wordings: tuple[str, ...]
    attributes: tuple[str, ...] = ()
    aligned: str = "{subject}"
    negative: str = ""
    harmful_from: float = 0.0
    highest: float = 1.0
    keep_probability: float = 1.0
    sources: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    question: str = ""
    keywords: tuple[str, ...] = ()
    exceptions: tuple[str, ...] = ()
    stated: tuple[str, ...] = ()
    descriptions: tuple[str, ...] = ()
    score: float = 1.0  # of a value that a Retriever found: 0 to 1, how sure it is, and why
    reason: str = ""

    def applies(self, seed: int, prompt: str, index: int) -> bool:
        """Whether the image (seed, prompt, index) gets the value token; see dealing.applies."""
        return applies(self.statement, self.keep_probability, seed, prompt, index)


def text_hash(text: str) -> int:
    """32 bits of a text, the same in every process and on every machine."""
    return zlib.crc32(text.encode())


def value_prompt(statement: str | None, prompt: str) -> str:
    """What the value encoder reads."""
    return f"{statement}, {prompt}" if statement else prompt


def attributed(statement: str, attribute: str) -> str:
    """What stands for a bias value in value_prompt where its images are to show one attribute."""
    return f"{statement}: {attribute}"


def phrase(template: str, subject: str) -> str:
    """The template with the subject for its {}; "a(n) {}" becomes "a" or "an" as the subject wants it."""
    return template.replace("a(n) {}", "an {}" if VOWEL.match(subject) else "a {}").format(subject)


def faults(value: Value) -> list[str]:
    """What is wrong with a principle, but for the retriever's fields."""
    problems = []
    for field in dataclasses.fields(value):
        kind, x = {str: str, float: (int, float)}.get(field.type, tuple), getattr(value, field.name)
        if not isinstance(x, kind) or kind is tuple and not all(isinstance(text, str) for text in x):
            what = {str: "text", tuple: "list of texts"}.get(kind, "number")
            problems.append(f"{field.name}={x!r} is no {what}")
    if value.kind not in ("bias", "harm"):
        problems.append(f"kind={value.kind!r} is neither bias nor harm")
    if problems:
        return problems
    bias = value.kind == "bias"
    if bias and len(value.attributes) < 2:
        problems.append("a bias needs two attributes or more")
    if not bias and value.harmful_from <= 0:
        problems.append(f"harmful_from={value.harmful_from}: a harm needs the least reading that is harmful, above 0")
    if value.classes and len(value.classes) != (n := len(value.attributes) if bias else 2):
        problems.append(f"{len(value.classes)} classes for a {value.kind} that needs {n}")
    if not value.wordings:
        problems.append("wordings is empty")
    places = ["{attribute}", "{subject}"] if bias else ["{subject}"]
    for field, texts, wanted in ("wordings", value.wordings, places), ("aligned", (value.aligned,), ["{subject}"]):
        problems += [
            f"{field}: {text!r} has {', '.join(found) or 'no braces'}, it needs {' and '.join(wanted)}, each once"
            for text in texts
            if sorted(found := re.findall("{[^{}]*}?|}", text)) != wanted
        ]
    if not 0 <= value.keep_probability <= 1:
        problems.append(f"keep_probability={value.keep_probability} is not 0 to 1")
    return problems


def read_tables(path=None) -> dict[str, dict]:
    """The tables of principles.toml, or of another such file, as they stand. Raises ValueError where it is no TOML."""
    path = pathlib.Path(path or PRINCIPLES)
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load(names, path=None) -> tuple[Value, ...]:
    """The principles of these names, in this order.

    Raises:
        ValueError: principles that are not in the file, or malformed ones; all are listed. Or it is no TOML.
    """
    path = path or PRINCIPLES
    tables = read_tables(path)
    known, problems = {}, []
    for name, table in tables.items():
        problems += [f"[{name}]: {problem}" for problem in retriever.faults(table)]
        try:
            value = Value(name, **{k: tuple(v) if isinstance(v, list) else v for k, v in table.items()})
        except TypeError as error:
            problems.append(f"[{name}]: {error}")
            continue
        problems += [f"[{name}]: {problem}" for problem in faults(value)]
        known[name] = value
    problems += [f"no value {name!r}" for name in names if name not in tables]
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}. Values there: {', '.join(tables)}")
    return tuple(known[name] for name in names)


def find(name: str, values: tuple[Value, ...]) -> Value:
    """The one of `values` with this name or statement. Raises ValueError that lists what there is."""
    for value in values:
        if name in (value.name, value.statement):
            return value
    raise ValueError(f"value {name!r} is not one of config.principles: {', '.join(f'{v.statement!r}' for v in values)}")


# ---------------------------------------------------------------------------- the retriever

LABELLED = pathlib.Path(__file__).with_name("retriever_prompts.toml")
PAPERS = ("gender", "race", "nudity", "gore", "zombie")
NEEDS = {"keywords": "keywords", "bm25": "descriptions", "dense": "descriptions", "llm": "descriptions"}


def labelled(part: str) -> dict[str, dict[str, set[str]]]:
    """The prompts of retriever_prompts.toml, by category, and the statements of the values that each is for.

    Args:
        part: "calibration" or "test".
    """
    with open(LABELLED, "rb") as file:
        categories = tomllib.load(file)[part]
    statements = {value.name: value.statement for value in load(PAPERS)}
    return {
        category: {prompt: {statements[name] for name in names} for prompt, names in rows.items()}
        for category, rows in categories.items()
    }


class Retriever:
    """Finds the values that a prompt is for.

    Args:
        values: those to choose from.
        backends: who looks for them, each on its own.
            "keywords": the rules of principles.toml; in milliseconds, with nothing loaded.
            "bm25": by the words that the prompt shares with the values' descriptions.
            "dense": by likeness to these in the text encoder of `sd`, a StableDiffusion.
            "llm": by asking the language model `model` behind `endpoint`, the base URL of an OpenAI-compatible server;
                OPENAI_API_KEY of the environment is its key, if it wants one. `cache` is a directory that keeps the
                answers, empty for none. Where it fails the keywords answer in its place: a warning and the reasons
                say so.
        votes: how many of the backends must find a value. With 1 and the keywords among them, a prompt that talks a
            language model out of a value gains nothing.

    Raises:
        ValueError: backends that are unknown or lack what they need, and votes that nothing can have; all are listed.
    """

    def __init__(
        self, values, backends=("keywords",), *, votes: int = 1, sd=None, endpoint: str = "", model: str = "",
        cache: str = "",
    ):  # fmt: skip
        self.values, self.votes = tuple(values), votes
        problems = [f"backend {name!r}: choose from {', '.join(NEEDS)}" for name in backends if name not in NEEDS]
        problems += [
            f"the value {value.name!r} has no `{field}` in principles.toml, for {name}"
            for name, field in NEEDS.items()
            if name in backends
            for value in self.values
            if not getattr(value, field)
        ]
        if not self.values or not 1 <= votes <= len(set(backends)):
            problems.append(f"{len(self.values)} values, backends={backends!r}, votes={votes}: at least one of each")
        if "dense" in backends and sd is None:
            problems.append("dense needs sd, a StableDiffusion")
        if "llm" in backends and not (model and endpoint.startswith(("http://", "https://"))):
            problems.append(f"llm needs a model and the base URL of an endpoint, not {model!r} and {endpoint!r}")
        if problems:
            raise ValueError("the retriever cannot work: " + "; ".join(problems))
        self.rules = retriever.Rules(self.values, retriever.lists())
        make = {
            "keywords": lambda: self.rules,
            "bm25": lambda: self._similar(retriever.bm25),
            "dense": lambda: self._similar(functools.partial(retriever.dense, sd=sd)),
            "llm": lambda: retriever.LanguageModel(self.values, endpoint, model, cache),
        }
        self.backends = {name: make[name]() for name in backends}

    def _similar(self, measure) -> retriever.Similar:
        calibration = {prompt: wanted for rows in labelled("calibration").values() for prompt, wanted in rows.items()}
        return retriever.Similar(self.values, measure, calibration)

    @classmethod
    def default(cls, values=None) -> "Retriever":
        """The keywords alone, of the paper's five values or others; without a network or a model."""
        return cls(load(PAPERS) if values is None else values)

    def __call__(self, prompt: str) -> list[Value]:
        """The values that a prompt is for, with score and reason; none leaves its image untouched.

        Returns:
            Harms before biases, the highest score first; [] where there is none.
        """
        found, failures = {}, []
        for name, backend in self.backends.items():
            try:
                found[name] = backend(prompt)
            except (ConnectionError, ValueError) as error:
                if name != "llm":
                    raise
                failures.append(str(error))
                warnings.warn(f"the keywords answer in the place of the language model: {error}", stacklevel=2)
        if failures:
            found.setdefault("keywords", self.rules(prompt))
        values = []
        for value in self.values:
            votes = {name: rows[value.name] for name, rows in found.items() if value.name in rows}
            if len(votes) >= min(self.votes, len(found)):
                reasons = [f"{name}: {reason}" for name, (_, reason) in votes.items()]
                reasons += [f"llm failed: {failure}" for failure in failures]
                score = max(score for score, _ in votes.values())
                values.append(dataclasses.replace(value, score=score, reason="; ".join(reasons)))
        return sorted(values, key=lambda value: (value.kind != "harm", -value.score))
