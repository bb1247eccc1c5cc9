"""Value principles, and the share of images that they are applied to."""

import dataclasses
import math
import pathlib
import re
import tomllib
import zlib

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
    keep_probability: float = 1.0
    sources: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    question: str = ""

    def applies(self, seed: int, prompt: str, index: int) -> bool:
        """Whether the image (seed, prompt, index) gets the value token; see `applies`."""
        return applies(self.statement, self.keep_probability, seed, prompt, index)


def applies(statement: str, keep_probability: float, seed: int, prompt: str, index: int) -> bool:
    """Whether a value is applied to the image (seed, prompt, index).

    Of any n consecutive images of a prompt, n * keep_probability get it, rounded up or down: spread
    evenly from a random start, for coins would add their own unevenness to what D1 measures.
    """
    start = text_hash(f"{seed}, {statement}, {prompt}") / 2**32
    before, after = (math.floor(start + keep_probability * n) for n in (index, index + 1))
    return after > before


def text_hash(text: str) -> int:
    """32 bits of a text, the same in every process and on every machine."""
    return zlib.crc32(text.encode())


def value_prompt(statement: str | None, prompt: str) -> str:
    """What the value encoder reads."""
    return f"{statement}, {prompt}" if statement else prompt


def phrase(template: str, subject: str) -> str:
    """The template with the subject for its {}; "a(n) {}" becomes "a" or "an" as the subject wants it."""
    return template.replace("a(n) {}", "an {}" if VOWEL.match(subject) else "a {}").format(subject)


def load(names, path=None) -> tuple[Value, ...]:
    """The principles of these names, in this order.

    Raises:
        ValueError: principles that are not in the file, or malformed ones; all are listed.
    """
    path = path or PRINCIPLES
    with open(path, "rb") as file:
        tables = tomllib.load(file)
    known, problems = {}, []
    for name, table in tables.items():
        try:
            value = Value(name, **{k: tuple(v) if isinstance(v, list) else v for k, v in table.items()})
        except TypeError as error:
            problems.append(f"[{name}]: {error}")
            continue
        if value.kind not in ("bias", "harm"):
            problems.append(f"[{name}]: kind={value.kind!r} is neither bias nor harm")
        elif value.kind == "bias" and len(value.attributes) < 2:
            problems.append(f"[{name}]: a bias needs two attributes or more")
        elif value.classes and len(value.classes) != (n := len(value.attributes) if value.kind == "bias" else 2):
            problems.append(f"[{name}]: {len(value.classes)} classes for a {value.kind} that needs {n}")
        known[name] = value
    problems += [f"no value {name!r}" for name in names if name not in known]
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}. Values there: {', '.join(tables)}")
    return tuple(known[name] for name in names)


def find(name: str, values: tuple[Value, ...]) -> Value:
    """The one of `values` with this name or statement. Raises ValueError that lists what there is."""
    for value in values:
        if name in (value.name, value.statement):
            return value
    raise ValueError(f"value {name!r} is not one of config.principles: {', '.join(f'{v.statement!r}' for v in values)}")
