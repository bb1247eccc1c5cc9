"""What prompts are about: the word lists in words.toml, and which words are held out."""

import collections
import hashlib
import pathlib
import re
import tomllib

from livo_jax.values.principles import phrase

WORDS = pathlib.Path(__file__).with_name("words.toml")

WORD = re.compile(r"[A-Za-z]{1,30}(?:[ -][A-Za-z]{1,30})*")


def stem(word: str) -> str:
    """The same for all forms of a word; now and then for two words, which only keeps them on one side of `split`."""
    word = word.lower()
    for plural, singular in (("people$", "person"), ("children$", "child"), ("men$", "man")):
        word = re.sub(plural, singular, word)
    return re.sub("f$", "v", re.sub("y$", "i", word.rstrip("es")))


def forms(text: str) -> tuple[str, ...]:
    """What is the same for all writings of a word or a phrase: its words' stems."""
    return tuple(sorted({stem(word) for word in re.split("[ -]", text)}))


MINORS = set(
    map(
        stem,
        "adolescent baby boy child girl infant juvenile kid minor newborn pupil schoolboy schoolchild schoolgirl teen"
        " teenager toddler youngster youth".split(),
    )
)


def fault(word) -> str:
    """Why this is no word for a list; "" if it is one."""
    if not isinstance(word, str) or not WORD.fullmatch(word):
        return "not letters, spaces and hyphens"
    if len(word.split(" ")) > 4:
        return "more than four words"
    if MINORS & set(forms(word)):
        return "a minor: a value about nudity is trained with these lists"
    return ""


def table_problems(table) -> list[str]:
    """Everything that is wrong with a table of words.toml."""
    wanted = {"source": str, "subject": str, "words": list}
    if not isinstance(table, dict) or table.keys() != wanted.keys():
        return [f"a table has {', '.join(wanted)} and nothing else"]
    if problems := [f"{name} is no {kind.__name__}" for name, kind in wanted.items() if type(table[name]) is not kind]:
        return problems
    if not table["source"].strip():
        problems.append("source is empty")
    if table["subject"].count("{}") != 1 or re.search("[{}]", table["subject"].replace("{}", "")):
        problems.append(f"subject={table['subject']!r}: one {{}} stands for the word")
    if not table["words"]:
        problems.append("words is empty")
    problems += [f"{word!r}: {reason}" for word in table["words"] if (reason := fault(word))]
    counts = collections.Counter(word.lower() for word in table["words"] if isinstance(word, str))
    return problems + [f"{word!r} {count} times" for word, count in counts.items() if count > 1]


def load_word_lists(names, path=WORDS) -> dict[str, dict]:
    """The tables of these names, of a file like words.toml, which says what they hold.

    Raises:
        ValueError: no names, names that the file lacks, malformed tables and words in it; all are listed.
    """
    try:
        tables = tomllib.loads(pathlib.Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    problems = [f"[{name}]: {problem}" for name, table in tables.items() for problem in table_problems(table)]
    problems += [f"no list {name!r}: there are {', '.join(tables)}" for name in names if name not in tables]
    if not names:
        problems.append(f"no list is named: there are {', '.join(tables)}")
    if problems:
        raise ValueError(f"{path}:\n  " + "\n  ".join(problems))
    return {name: tables[name] for name in names}


def words(names, path=WORDS) -> list[str]:
    """The subjects that the words of these tables make, in their order, each once whatever its case.

    Raises:
        ValueError: as of `load_word_lists`.
    """
    subjects = {}
    for table in load_word_lists(names, path).values():
        for subject in (phrase(table["subject"], word) for word in table["words"]):
            subjects.setdefault(subject.lower(), subject)
    return list(subjects.values())


def split(subjects, held_out_share: float = 0.2, seed: int = 0) -> tuple[list[str], list[str]]:
    """(seen, held out): in their order, about this share of them held out of all training.

    A subject's side hangs on its last word but "person" alone, in whatever form: not on the others of the list, and
    "truck driver" is held out where "Drivers" are.

    Raises:
        ValueError: no subject is left on the seen side.
    """

    def held_out(subject):
        named = [word for word in re.split("[ -]", subject) if stem(word) != stem("person")] or ["person"]
        digest = hashlib.sha256(f"{seed}, {stem(named[-1])}".encode()).digest()
        return int.from_bytes(digest[:4], "big") < held_out_share * 2**32

    sides = [s for s in subjects if not held_out(s)], [s for s in subjects if held_out(s)]
    if not sides[0]:
        raise ValueError(f"all of {', '.join(subjects)} are held out: give more subjects, or less held_out_share")
    return sides
