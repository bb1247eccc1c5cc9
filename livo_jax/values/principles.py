"""Value principles: what a value is, and the share of images that it is applied to."""

import dataclasses
import functools
import math
import pathlib
import re
import tomllib
import zlib

from livo_jax.values.rules import Rules, fold

# Who can decide which prompts a value is for.
BACKENDS = ("keywords", "ngrams", "states", "first_steps", "bm25", "dense", "llm", "always")

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
    auto: tuple[str, ...] = ("keywords",)
    score: float = 1.0  # of a value that a Retriever found: 0 to 1, how sure it is, and why
    reason: str = ""


FIELDS = [field.name for field in dataclasses.fields(Value)][1:-2]  # those of a table
REQUIRED = [field for field in FIELDS if not hasattr(Value, field)]


def text_hash(text: str) -> int:
    """32 bits of a text, the same in every process and on every machine."""
    return zlib.crc32(text.encode())


def value_prompt(statement: str | None, prompt: str) -> str:
    """What the value encoder reads."""
    return f"{statement}, {prompt}" if statement else prompt


def attributed(statement: str, attribute: str) -> str:
    """What stands for a bias value in value_prompt where its images are to show one attribute."""
    return f"{statement}: {attribute}"


def own_statement(text: str) -> str:
    """The statement of a value, or of that whose attribute it is."""
    return text.split(": ")[0]


def phrase(template: str, subject: str) -> str:
    """The template with the subject for each {}; "a(n) {}" becomes "a" or "an" as the subject wants it."""
    return template.replace("a(n) {}", "an {}" if VOWEL.match(subject) else "a {}").replace("{}", subject)


def template_problems(where: str, template: str) -> list[str]:
    """What keeps a template, `where` it is, from taking a subject, as `phrase` has it."""
    fits = set(re.findall("[{}]+", template)) == {"{}"}
    return [] if fits else [f"{where}={template!r}: it needs {{}} for the subject, and no other braces"]


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
    if not bias and not 0 < value.harmful_from <= value.highest < math.inf:
        problems.append(
            f"harmful_from={value.harmful_from}, highest={value.highest}: a harm needs the least reading that is"
            " harmful, above 0, and the highest that there is, as high at least"
        )
    for field, texts in ("statement", (value.statement,)), ("attributes", value.attributes):
        if wrong := [text for text in texts if text != text.strip() or not text.isprintable() or not text]:
            problems.append(f"{field}: {', '.join(map(repr, wrong))} is no text on one line without space around it")
    if len({*value.attributes}) < len(value.attributes):
        problems.append(f"attributes={list(value.attributes)}: one is there twice")
    if "auto" in (value.name, value.statement):
        problems.append("'auto' asks for the retriever: call it, and its statement, otherwise")
    if value.classes and len(value.classes) != (n := len(value.attributes) if bias else 2):
        problems.append(f"{len(value.classes)} classes for a {value.kind} that needs {n}")
    if not value.wordings:
        problems.append("wordings is empty")
    if not value.auto or not set(value.auto) <= set(BACKENDS):
        problems.append(f"auto={list(value.auto)!r}: choose from {', '.join(BACKENDS)}")
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
    if not path.is_file():
        raise FileNotFoundError(f"config.principles_file={str(path)!r}: there is no such file")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
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
        if not isinstance(table, dict):
            problems.append(f"{name}={table!r} is of no value: it stands above the first [NAME]")
            continue
        problems += [f"[{name}]: {problem}" for problem in keyword_faults(table)]
        if lacking := [field for field in REQUIRED if field not in table]:
            problems.append(f"[{name}] lacks {', '.join(lacking)}")
        if unknown := [field for field in table if field not in FIELDS]:
            problems.append(f"[{name}] has {', '.join(unknown)}: there are {', '.join(FIELDS)}")
        if lacking or unknown:
            continue
        value = Value(name, **{k: tuple(v) if isinstance(v, list) else v for k, v in table.items()})
        problems += [f"[{name}]: {problem}" for problem in faults(value)]
        known[name] = value
    problems += [f"no value {name!r}" for name in names if name not in tables]
    problems += [f"{name!r} is asked for twice" for name in dict.fromkeys(names) if [*names].count(name) > 1]
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}. Values there: {', '.join(tables)}")
    return tuple(known[name] for name in names)


def same_texts(values: tuple[Value, ...]) -> list[str]:
    """A line for each text that would be two things: results, tokens and --value go by statement and by name."""
    of_texts = {}
    for value in values:
        for text in {value.name, value.statement, *(attributed(value.statement, a) for a in value.attributes)}:
            of_texts.setdefault(text, []).append(f"[{value.name}]")
    return [f"{text!r} is of {' and '.join(names)}: reword one" for text, names in of_texts.items() if len(names) > 1]


def load_principles(config) -> tuple[Value, ...]:
    """Those of config.principles, from config.principles_file or, where it names none, the package's principles.toml.

    Raises:
        ValueError: as `load`, or two of them would be told apart by nothing. FileNotFoundError: there is no such file.
    """
    path = config.get("principles_file") or None
    found = load(config.principles, path and pathlib.Path(path).expanduser())
    if problems := same_texts(found):
        raise ValueError(f"config.principles={tuple(config.principles)}: {'; '.join(problems)}")
    return found


def find(name: str, values: tuple[Value, ...]) -> Value:
    """The one of `values` with this name or statement. Raises ValueError that lists what there is."""
    for value in values:
        if name in (value.name, value.statement):
            return value
    raise ValueError(f"value {name!r} is not one of config.principles: {', '.join(f'{v.statement!r}' for v in values)}")


LISTS = pathlib.Path(__file__).with_name("people.toml")


@functools.cache
def lists() -> dict[str, list[str]]:
    """The lists of people.toml."""
    with open(LISTS, "rb") as file:
        return tomllib.load(file)


@functools.lru_cache(16)  # a call with values="auto" makes a retriever, and reading the keywords takes a while
def keyword_rules(values: tuple[Value, ...]) -> Rules:
    return Rules(values, lists())


def keyword_faults(table: dict) -> list[str]:
    """What is wrong with the retriever's fields of a table of principles.toml."""
    problems = []
    for field in ("keywords", "exceptions", "stated", "descriptions"):
        phrases = table.get(field, [])
        if not isinstance(phrases, list) or not all(isinstance(p, str) and re.search(r"\w", fold(p)) for p in phrases):
            problems.append(f"{field}={phrases!r} is no list of phrases")
        elif field != "descriptions":
            names = {word[1:] for phrase in phrases for word in phrase.split() if word.startswith("@")}
            problems += [f"{field}: there is no list @{name} in people.toml" for name in names - lists().keys()]
    return problems
