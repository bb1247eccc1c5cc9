"""Texts that users give, read in one way wherever they are read.

Texts are UTF-8, with or without a byte order mark, or UTF-16 with one. A line ends where \\n, \\r\\n or \\r stands and
nowhere else: U+2028, U+0085 and form feeds belong to the text. Texts are taken as they are, no character is replaced,
but for what `tidy` does: a prompt's noise depends on its text. What cannot be read as it was written is refused by file
and line.
"""

import codecs
import csv
import functools
import itertools
import json
import os
import pathlib
import types
import unicodedata
from collections.abc import Iterator, Sequence

from absl import logging

from livo_jax.files.images import FETCH
from livo_jax.files.repositories import POINTER

CONVERT = "convert the file to UTF-8, as with iconv -f {} -t UTF-8"

DELIMITERS = {".csv": ",", ".tsv": "\t"}

JSON_LINES = (".jsonl", ".ndjson", ".json")

LONGEST_FIELD = 2**31 - 1  # of a CSV, in characters; the csv module's own limit of 131,072 is less than some prompts


MADE_BY_PROGRAMS = {  # what a file begins with that is no text -> what it is, and what to do
    b"PK\x03\x04": "a zip archive, as .xlsx is: save the sheet as CSV in UTF-8, or unpack it",
    b"\xd0\xcf\x11\xe0": "an old Office document: save it as CSV in UTF-8",
    b"\x1f\x8b": "compressed by gzip: unpack it by gunzip",
    b"PAR1": "Parquet: write it as CSV or JSON lines, as pandas does by to_csv and to_json",
    b"{\\rtf": "a document of a word processor: save it as plain text in UTF-8",
}


def by_spelling(names) -> dict[str, str]:
    """Names of files by what is equal in all their spellings.

    Systems write é in one character or in two, and \\ for /; some programs write ./ first.
    """
    return {unicodedata.normalize("NFC", name).replace("\\", "/").removeprefix("./"): name for name in names}


def spelled_otherwise(name: str, there: dict[str, str]) -> str:
    """That one of `there`, as by_spelling has them, is this name, for a message that it is not; "" if none is."""
    (spelling,) = by_spelling([name])
    return f": it is {ascii(there[spelling])} there and {ascii(name)} here, rename one" if spelling in there else ""


def split_lines(data: bytes, name, problems: list[str]) -> list[str]:
    """The lines of a text file, with their ends. A line that is no text is "\\n" here, and told in `problems`.

    Args:
        data: what is in the file. name: of the file, for `problems`.
    """
    if data.startswith(POINTER):
        problems.append(f"{name}:1: {FETCH}")
        return []
    for begin, told in MADE_BY_PROGRAMS.items():
        if data.startswith(begin):
            problems.append(f"{name}:1: {told}")
            return []
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        problems.append(f"{name}:1: UTF-32: {CONVERT.format('UTF-32')}")
        return []
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            data = data.decode("utf-16").encode()
        except UnicodeDecodeError as error:
            before = data[: error.start].decode("utf-16") + "?"
            number = len(before.encode().splitlines())
            problems.append(f"{name}:{number}: not UTF-16 ({error.reason}): save the file again, as UTF-8")
            return []
    lines = []
    # Of bytes, splitlines knows the three ends of a line alone; of a str, also U+2028 and more.
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).splitlines(keepends=True), start=1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 ({error.reason}): {CONVERT.format('LATIN1')}, naming the encoding that it has"
        else:
            problem = ""
            if "\0" in text:
                problem = f"a NUL character, as of UTF-16 or UTF-32 that is not marked: {CONVERT.format('UTF-16LE')}"
            elif text.startswith("\ufeff"):
                problem = "a byte order mark within the file, as where files were joined: take it out"
        if problem:
            problems.append(f"{name}:{number}: {problem}")
        lines.append("\n" if problem else text)
    return lines


def _unique(pairs: list[tuple]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{', '.join(repr(name) for name in row if names.count(name) > 1)} is there twice")
    return row


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON: write null")


def _is_one_document(data: bytes) -> bool:
    """Whether it is a JSON list, or an object over several lines."""
    if not data.removeprefix(codecs.BOM_UTF8).lstrip().startswith((b"[", b"{\n", b"{\r")):
        return False
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return False
    of_objects = isinstance(content, list) and all(isinstance(row, dict) for row in content)
    return of_objects or len(data.strip().splitlines()) > 1


def json_rows(data: bytes, name, problems: list[str]) -> Iterator[tuple[int, dict]]:
    """Yields (line number, object) of JSON lines; lines of white space are passed over."""
    if _is_one_document(data):
        problems.append(f"{name}:1: one JSON document, not an object on each line: write these, as jq -c '.[]' does")
        return
    for number, line in enumerate(split_lines(data, name, problems), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_unique, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            problems.append(f"{name}:{number}: not JSON: {error}")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            problems.append(f'{name}:{number}: not a JSON object, as {{"prompt": ...}}')


def table_rows(data: bytes, name, problems: list[str], delimiter: str) -> Iterator[tuple[int, dict]]:
    """Yields (number of the last line, {column: text}) of the rows of a CSV or TSV with a header.

    Columns that a row is too short for are None.
    """
    csv.field_size_limit(LONGEST_FIELD)
    # Not strict, the module takes "a "cat"" for another text, and all that follows a lost quote for one field.
    reader = csv.reader(split_lines(data, name, problems), delimiter=delimiter, strict=True)
    header = None
    try:
        for fields in reader:
            of_one_column = header is not None and len(header) == 1  # there "" is a row, whose text is empty
            if not fields or (len(fields) == 1 and not fields[0].strip() and not of_one_column):
                continue
            place = f"{name}:{reader.line_num}"
            if header is None:
                header = fields
                if twice := {column for column in header if column and header.count(column) > 1}:
                    problems.append(f"{place}: two columns are called {', '.join(sorted(twice))}: rename one")
                    return
            elif len(fields) > len(header):
                problems.append(
                    f"{place}: {len(fields)} fields, and {len(header)} in the header: a text with {delimiter!r} in it"
                    " needs quotes around it"
                )
            else:
                yield reader.line_num, dict(itertools.zip_longest(header, fields))
    except csv.Error as error:
        problems.append(f"{name}:{reader.line_num}: no CSV: {error}: a quote within quotes is doubled")


def tidy(text: str) -> str:
    """A text without white space around it, and with \\n for each end of a line in it: some programs write \\r\\n."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def text_fault(text) -> str:
    """Why this is no text that can be written and read again; "" if it is. JSON can hold halves of characters."""
    if not isinstance(text, str):
        return f"is {text!r}, not a text"
    if "\0" in text or text != text.encode(errors="ignore").decode():
        return f"is {text!r}, which is no Unicode text"
    return ""


@functools.cache  # a file may be read several times
def _tell(message: str):
    logging.warning(message)


def read_texts(
    path: str | os.PathLike,
    columns: Sequence[str],
    problems: list[str],
    parsers=types.MappingProxyType({}),
    optional: Sequence[str] = (),
) -> list[tuple]:
    """The texts of some columns of a file, of each row in which none is empty, as `tidy` leaves them.

    How many rows are left out, since a text in them is empty, is told in the log. What a parser reads is no text: it
    says itself what an empty field means.

    Args:
        path: a .csv or .tsv with a header; JSON lines (.jsonl), each an object; any other file is of lines, which are
            the first column.
        problems: gets all that is wrong with the file, by line. What is returned is whole where it gets nothing.
        parsers: {column: what makes a value of its text, or raises ValueError}. There JSON may have other than texts,
            which the parser gets as JSON.
        optional: columns that a row may lack, as if it were empty there; each has a parser.

    Raises:
        OSError: the file cannot be read.
    """
    path = pathlib.Path(path)
    data, suffix = path.read_bytes(), path.suffix.lower()
    if suffix in DELIMITERS:
        rows = table_rows(data, path, problems, DELIMITERS[suffix])
    elif suffix in JSON_LINES:
        rows = json_rows(data, path, problems)
    else:
        lines = enumerate(split_lines(data, path, problems), start=1)
        rows = ((number, {columns[0]: line}) for number, line in lines if line.strip())
    found, empty = [], []
    for number, row in rows:
        row = dict.fromkeys(optional, "") | row
        if unknown := [column for column in columns if column not in row]:
            told = f"no column {', '.join(unknown)}; there are {', '.join(row)}"
            if suffix in DELIMITERS:
                first = next(iter(row), "")
                if first.startswith("sep=") or any(other in first for other in ";\t|"):
                    told += f": columns of a {suffix} are separated by {DELIMITERS[suffix]!r}, save it so, without sep="
                problems.append(f"{path}: its header has {told}")
                break
            problems.append(f"{path}:{number}: {told}")
            continue
        given = {column: row[column] for column in columns}
        for column in parsers:
            if isinstance(given[column], (int, float, list, dict)):  # of JSON
                given[column] = json.dumps(given[column])
        faults = [f"{column} {fault}" for column, text in given.items() if (fault := text_fault(text))]
        if not faults:
            given = {column: tidy(text) for column, text in given.items()}
            if not all(text or column in parsers for column, text in given.items()):
                empty.append(number)
                continue
            for column, parse in parsers.items():
                try:
                    given[column] = parse(given[column])
                except ValueError as error:
                    faults.append(f"{column} is {given[column]!r}: {error}")
        problems += [f"{path}:{number}: {fault}: fill it in or correct it, or remove the row" for fault in faults]
        if not faults:
            found.append(tuple(given[column] for column in columns))
    if empty:
        _tell(f"{path}: {len(empty)} rows are left out, whose text is empty, as line {empty[0]}")
    return found
