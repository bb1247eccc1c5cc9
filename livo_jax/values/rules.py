"""Keyword rules, which find the values that a prompt is for in whatever spelling.

Called with a prompt they return {name of a value they find: (score, and the reason)}. Exports carry this file as it is:
it needs the standard library alone.
"""

import itertools
import re
import unicodedata

# ---------------------------------------------------------------------------- how a prompt can be read

# Letters of other scripts that look like Latin ones; whatever Unicode names a LATIN letter needs no place here.
LOOKALIKES = str.maketrans(
    "АВЕЅІЈКМНОРСТУХавекмнорстухѕіјԁһԛԝӏьпгиΑΒΕΖΗΙΚΜΝΟΡΤΥΧαβεηικνορτυχωγօսոհց’",
    "ABESIJKMHOPCTYXabekmhopctyxsijdhqwlbnruABEZHIKMNOPTYXabenikvoptuxwyounhg'",
)
LATIN = re.compile(r"LATIN .*?\b([A-Z])(?: WITH .*)?$")
# Signs that stand for letters; 1 for two of them.
SIGNS = [str.maketrans("0123456789@$€+|!", f"o{one}zeasgtbgaseti{bar}") for one, bar in ("il", "li")]
LETTER = r"(?:[^\W_]|[@$€|!])"
SPELLED = re.compile(rf"(?<!\w)(a )?({LETTER}(?:[\s._*·-]{LETTER}){{2,}})(?!\w)")
WITHIN = re.compile(
    r"[._·-](?<=[^\W_].)(?=[^\W_])"
)  # a sign between letters; it comes first, for that is quick to find
LONG = re.compile(r"([^\W\d_])\1{2,}")


def fold(prompt: str) -> str:
    """The prompt in plain small letters: no accents, lookalikes or invisible characters; emojis by their names."""
    if prompt.isascii():
        return prompt.casefold()
    folded = []
    for c in unicodedata.normalize("NFKD", prompt).translate(LOOKALIKES):
        name = "" if c.isascii() else unicodedata.name(c, "")
        if unicodedata.category(c) in ("Mn", "Me", "Cf"):
            continue
        if latin := LATIN.search(name):
            c = latin[1]
        elif unicodedata.category(c) == "So":
            c = f" {name} "
        folded.append(c)
    return "".join(folded).casefold()


def readings(prompt: str) -> list[str]:
    """All that a prompt may say to a person who sees through its spelling; the plain reading is the first.

    "b l o o d", "bl0od", "b.lood", "blooooood" are read as "blood" too.
    """
    plain = " ".join(SPELLED.sub(lambda run: (run[1] or "") + re.sub(r"[\s._*·-]", "", run[2]), fold(prompt)).split())
    signs = re.sub(r"[@$€+|!]+(?!\w)", "", plain)  # at a word's end they are none of its letters
    signed = list(dict.fromkeys([plain, *(signs.translate(table) for table in SIGNS)]))
    whole = [WITHIN.sub("", text) for text in signed]
    short = [LONG.sub(times, text) for text in dict.fromkeys(signed + whole) for times in (r"\1", r"\1\1")]
    return list(dict.fromkeys([plain, *short]))


# ---------------------------------------------------------------------------- rules


ONE = re.compile(r"(?:[a-z]|\[[aeiou]\*\])(?![?*])")  # a letter in an expression, or a vowel that a star may stand for
IRREGULAR = {"man": "m(?:an|ans|en)", "person": "pe(?:rson|rsons|ople)", "child": "child(?:ren)?"}


def inflected(word: str, verb: bool) -> str:
    """A regular expression of a word's forms: its plural; if a `verb`, all regular ones, with stars for vowels too."""
    more = "|ed|ing" if verb else ""
    if end := next((end for end in IRREGULAR if word.endswith(end)), ""):
        forms = IRREGULAR[end]
    elif re.search("[^aeiou]y$", word):
        end, forms = "y", f"(?:y|ies{'|ied|ying|ier|iest|ily' if verb else ''})"
    elif found := re.search("fe?$", word):
        end, forms = found[0], f"(?:{found[0]}(?:s{more})?|ves)"
    elif word.endswith("e"):
        end, forms = "e", f"(?:e|es{more})"
    else:
        forms = f"(?:e?s|{re.escape(word[-1])}?(?:ed|ing))?" if verb else "(?:e?s)?"
    whole = re.escape(word.removesuffix(end)) + forms
    return re.sub("[aeiou]", r"[\g<0>*]", whole) if verb else whole


def any_of(alternatives: list[str]) -> str:
    """A regular expression of the first alternative that fits.

    Those side by side that begin with a letter are told apart by it first, those of one letter by the next, and so on:
    of a thousand a few are tried. Only one letter can stand at a place, so the one that fits first stays the first.
    """
    if len(alternatives) == 1:
        return alternatives[0]
    grouped = []
    for lettered, run in itertools.groupby(alternatives, lambda text: bool(ONE.match(text))):
        if not lettered:
            grouped += run
            continue
        letters = {}
        for text in run:
            letter = ONE.match(text)[0]
            letters.setdefault(letter, []).append(text[len(letter) :])
        grouped += [letter + any_of(endings) for letter, endings in letters.items()]
    return f"(?:{'|'.join(grouped)})"


def entries(name: str, lists: dict[str, list[str]]) -> list[str]:
    """The phrases of a list of people.toml, those of a list that is an entry of it too."""
    found = []
    for entry in lists[name]:
        found += entries(entry[1:], lists) if re.fullmatch(r"@\w+", entry) else [entry]
    return found


def expression(phrase: str, verb: bool, lists: dict[str, list[str]]) -> str:
    """A regular expression of a phrase of principles.toml, which says how they are written."""
    whole, joint = "", ""
    for word in fold(phrase).replace("-", " ").split():
        if word == "...":
            whole, joint = whole + r"(?:[ -]\w[\w/]*){0,2}", "[ -]"
            continue
        if word.startswith("@"):
            word = any_of([expression(entry, verb, lists) for entry in entries(word[1:], lists)])
        else:
            word = inflected(word, verb)
        whole, joint = whole + joint + word, "[ -]?"
    return whole


def pattern(phrases: list[str], verb: bool, lists: dict[str, list[str]]) -> re.Pattern:
    """What finds the phrases in a reading, never inside a word."""
    whole = any_of([expression(phrase, verb, lists) for phrase in phrases]) if phrases else "(?!)"
    return re.compile(rf"(?<![^\W_]){whole}(?![^\W_])")


def _without(exceptions: re.Pattern, keywords: re.Pattern, text: str) -> str:
    """The text without exceptions, but for one that goes on as a keyword: "a woman truck" of a woman truck driver."""
    return exceptions.sub(lambda found: found[0] if keywords.match(text, found.end() + 1) else " , ", text)


class Rules:
    """The keywords of principles.toml.

    Args:
        values: with the fields name, kind, keywords, exceptions and stated of principles.toml.
        lists: people.toml's.
    """

    def __init__(self, values, lists: dict[str, list[str]]):
        compiled = {}  # values share phrases

        def compile(phrases, verb):
            key = tuple(phrases), verb
            if key not in compiled:
                compiled[key] = pattern(phrases, verb, lists)
            return compiled[key]

        self.patterns = {
            # A bias is about nouns: a cook, but not what is cooked.
            value.name: [
                compile(phrases, value.kind == "harm") for phrases in (value.keywords, value.exceptions, value.stated)
            ]
            for value in values
        }

    def __call__(self, prompt: str) -> dict[str, tuple[float, str]]:
        found, texts, without = {}, readings(prompt), {}
        for name, (keywords, exceptions, stated) in self.patterns.items():
            if not any(map(keywords.search, texts)):  # nor is one where the exceptions are taken out
                continue
            key = id(exceptions), id(keywords)  # a hash of a pattern reads all of it
            if key not in without:
                without[key] = [_without(exceptions, keywords, text) for text in texts]
            rest = without[key]
            match = next(filter(None, map(keywords.search, rest)), None)
            if match and not any(map(stated.search, rest)):
                found[name] = 1.0, f"it says {match[0]!r}"
        return found

    def rest(self, prompt: str) -> tuple[list[str], set[str]]:
        """The readings without any value's exceptions, and the names of the values whose attribute they state."""
        texts, names = readings(prompt), set()
        for name, (keywords, exceptions, stated) in self.patterns.items():
            texts = [_without(exceptions, keywords, text) for text in texts]
            names |= {name} if any(map(stated.search, texts)) else set()
        return texts, names
