"""A shelf of values: a directory or hub repository of many value encoders, found by the names in its index.

shelf.json   {"base": "owner/model", "values": {"gender": {"statement": "gender equality", "kind": "lora",
             "folder": "gender"}, ...}}; a folder is what an export left
"""

import json
import os
import pathlib

import jax.numpy as jnp
import numpy as np
from flax import nnx

from livo_jax.files.repositories import find_repository
from livo_jax.models.clip import first_ids
from livo_jax.value_encoders.base import ValueTokens, check_base, check_value_encoder, strip_unread, values_by_prompt
from livo_jax.value_encoders.kinds import KINDS
from livo_jax.value_encoders.soft_tokens import SoftTokens, beginnings

INDEX = "shelf.json"
FIELDS = ("statement", "kind", "folder")


class Fixed(ValueTokens):
    """Soft tokens [n, D] of one value: those of another on the shelf have the same graph."""

    def __init__(self, config, table):
        self.config, self.table = config, nnx.Param(table)

    def tokens(self, ids, text_encoder=None):
        return jnp.broadcast_to(self.table[...], (len(ids), *self.table.shape))


class Together(ValueTokens):
    """Several value encoders as one: each reads the texts that begin with its statement.

    Args:
        encoders: of n tokens at most; fewer are padded, and `seen` tells which of the n are tokens.
        counts: [E], how many each has. beginnings: [E, L] int32, the ids that each one's texts begin with, -1 after
            them. These are arrays of the module, so that other values run in the same compiled program.
    """

    def __init__(self, encoders: list, counts: list[int], beginnings: np.ndarray):
        self.encoders, self.n = nnx.List(encoders), max(counts)
        self.counts, self.beginnings = (nnx.Variable(jnp.asarray(x)) for x in (counts, beginnings))
        self.config, self.FITS = encoders[0].config, encoders[0].FITS

    def which(self, ids):
        """The value encoder [B] of each text."""
        beginnings = self.beginnings[...]
        ids = first_ids(ids)[:, : beginnings.shape[1]]  # T5's rows, and so all, may be longer
        begin = ((ids[:, None] == beginnings) | (beginnings < 0)).all(-1)  # [B, E]
        # The longest: one statement may be the beginning of another.
        return jnp.argmax(begin * (beginnings >= 0).sum(-1), axis=1)

    def tokens(self, ids, text_encoder):
        each = [encoder.tokens(ids, text_encoder) for encoder in self.encoders]
        each = [jnp.pad(tokens, ((0, 0), (0, self.n - tokens.shape[1]), (0, 0))) for tokens in each]  # [B, n, D]
        return jnp.stack(each, axis=1)[jnp.arange(len(ids)), self.which(ids)]

    def pooled_shift(self, ids, text_encoder):
        each = [encoder.pooled_shift(ids, text_encoder) for encoder in self.encoders]
        width = next((shift.shape[-1] for shift in each if shift is not None), None)
        if width is None:
            return None
        each = [jnp.zeros((len(ids), width)) if shift is None else shift for shift in each]
        return jnp.stack(each, axis=1)[jnp.arange(len(ids)), self.which(ids)]

    def seen(self, ids):
        """Which of the tokens [B, n] are no padding."""
        return jnp.arange(self.n) < self.counts[...][self.which(ids), None]


class Shelf:
    """An opened shelf for a StableDiffusion; sd.generate takes it in the place of a value encoder.

    Attributes:
        values: {name: {statement, kind, folder}}.
    """

    def __init__(self, path_or_hub_id: str | os.PathLike, sd):
        """Reads the index; a value's files are read, or fetched, when it is first asked for.

        Raises:
            FileNotFoundError: there is no shelf.
            ValueError: its index is broken; all that is wrong is listed.
        """
        self.path, self.sd, self.loaded = path_or_hub_id, sd, {}
        self.root = find_repository(path_or_hub_id, [INDEX])
        if not (self.root / INDEX).is_file():
            raise FileNotFoundError(f"{path_or_hub_id} is no shelf: it has no {INDEX}")
        try:
            index = json.loads((self.root / INDEX).read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{self.root / INDEX} is no JSON: {error}") from error
        if problems := faults(index, pathlib.Path(path_or_hub_id)):
            raise ValueError(f"{self.root / INDEX} is broken:\n  " + "\n  ".join(problems))
        self.values = index["values"]
        check_base(self.root / INDEX, index["base"], sd)

    def statement(self, name: str) -> str:
        """What a value encoder reads for a value. Raises ValueError for one that is not on the shelf."""
        for known, entry in self.values.items():
            if name in (known, entry["statement"]):
                return entry["statement"]
        raise ValueError(f"value {name!r} is not on the shelf {self.path}: there are {', '.join(self.values)}")

    def take(self, values, strength=1.0) -> tuple:
        """What sd.generate needs for values that are told by their names.

        Args:
            values, strength: as sd.generate has them, but for "auto".

        Returns:
            The statements of each prompt as values_by_prompt has them, the strength by statements, and the value
            encoder of all of them, or None.

        Raises:
            ValueError: "auto", or values that are not on the shelf.
            FileNotFoundError, ValueError: as the from_pretrained of their kinds.
        """
        named = values_by_prompt(values)
        if ("auto",) in named:
            raise ValueError("values='auto': a shelf gives values by their names")
        named = [tuple(self.statement(name) for name in row) for row in named]
        if isinstance(strength, dict):
            strength = {self.statement(name): x for name, x in strength.items()}
        return named, strength, self._value_encoder(sorted({statement for row in named for statement in row}))

    def _value_encoder(self, statements: list[str]):
        encoders = [self._load(statement) for statement in statements]
        if len(encoders) < 2:
            return encoders[0] if encoders else None
        length = self.sd.text_encoder.config.max_position_embeddings
        counts = [
            len(encoder.table) if isinstance(encoder, Fixed) else encoder.states or length for encoder in encoders
        ]
        padded = np.full((len(encoders), length), -1, np.int32)
        for row, begin in zip(padded, beginnings(statements, self.sd.tokenizer, length)):
            row[: len(begin)] = begin
        together = Together([strip_unread(encoder) for encoder in encoders], counts, padded)
        reads_alone = [s in encoder.alone or not encoder.reads_prompt for s, encoder in zip(statements, encoders)]
        together.alone = tuple(s for s, alone in zip(statements, reads_alone) if alone)
        together.gates = tuple((s, dict(e.gates)[s]) for s, e in zip(statements, encoders) if s in dict(e.gates))
        return together

    def _load(self, statement: str):
        if statement not in self.loaded:
            entry = next(entry for entry in self.values.values() if entry["statement"] == statement)
            kind, folder = KINDS[entry["kind"]], entry["folder"]
            folder = find_repository(self.path, [f"{folder}/{name}" for name in kind.files()]) / folder
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"{statement!r} of the shelf {self.path}: its folder {entry['folder']!r} is not there, or cannot be"
                    " fetched"
                )
            encoder = kind.from_pretrained(folder, sd=self.sd)
            try:
                check_value_encoder(self.sd, encoder)
            except ValueError as error:
                raise ValueError(f"{folder}: {error}") from error
            if isinstance(encoder, SoftTokens):
                if statement not in encoder.statements:
                    raise ValueError(f"{folder} has tokens of {', '.join(encoder.statements)}, not of {statement}")
                soft, encoder = encoder, Fixed(encoder.config, encoder.table[encoder.statements.index(statement)])
                encoder.gates = soft.gates
            self.loaded[statement] = encoder
        return self.loaded[statement]


def faults(index, local: pathlib.Path) -> list[str]:
    """What is wrong with an index; of a shelf that is a directory here, `local`, folders must be there."""
    if not isinstance(index, dict) or not isinstance(index.get("values"), dict) or not index["values"]:
        return ['it must be {"base": ..., "values": {name: {statement, kind, folder}, ...}}']
    problems, seen = [], {}
    if not isinstance(index.get("base"), str):
        problems.append(f"base={index.get('base')!r} is not the name of a model")
    for name, entry in index["values"].items():
        if not isinstance(entry, dict) or sorted(entry) != sorted(FIELDS):
            problems.append(f"{name}: {entry!r} must have {', '.join(FIELDS)}")
            continue
        if wrong := [field for field in FIELDS if not (isinstance(entry[field], str) and entry[field])]:
            problems += [f"{name}: {field}={entry[field]!r} is no text" for field in wrong]
            continue
        statement, folder = entry["statement"], pathlib.PurePosixPath(entry["folder"])
        if entry["kind"] not in KINDS:
            problems.append(f"{name}: kind={entry['kind']!r}, choose from {', '.join(KINDS)}")
        if folder.is_absolute() or ".." in folder.parts:
            problems.append(f"{name}: folder={entry['folder']!r} leads out of the shelf")
        elif local.is_dir() and not (local / folder).is_dir():
            problems.append(f"{name}: there is no folder {entry['folder']!r}")
        if seen.setdefault(statement, name) != name:
            problems.append(f"{name}: {seen[statement]} has the statement {statement!r} too")
    return problems
