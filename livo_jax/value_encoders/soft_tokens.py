"""A value encoder that is a table of learned tokens."""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from livo_jax import sharding, values
from livo_jax.files.repositories import describe, find_repository, open_tensors, write_safetensors
from livo_jax.models.clip import CLIPTextConfig, CLIPTextConfigs, first_ids
from livo_jax.models.weights import for_each_leaf, put, split
from livo_jax.value_encoders.base import EXPORTED, TrainableTokens, check_base, check_export, set_exported


def beginnings(statements, tokenizer, length: int) -> list[list[int]]:
    """The token ids that texts of so many tokens begin with, which read these statements before a prompt."""
    ids = tokenizer([values.value_prompt(statement, "") for statement in statements])["input_ids"]
    return [row[:-1][: length - 1] for row in ids]


class SoftTokens(TrainableTokens):
    """Kind "token": n learned tokens of each value (Lester et al. 2021), whatever the prompt.

    Args:
        config: of the text encoder.
        statements: the values, which ids are told by that begin with one.
        tokenizer: the model's.
        count: how many tokens a value has.

    Raises:
        ValueError: no statements, or no tokens.
    """

    SETTINGS = ("count", "statements")
    FILE = "value_tokens.safetensors"

    def __init__(self, config: CLIPTextConfig | CLIPTextConfigs, *, statements, tokenizer, count: int):
        if count < 1 or not statements:
            raise ValueError(f"{count} soft tokens of {len(statements)} values: at least 1 of each")
        self.config, self.count, self.statements = config, count, tuple(statements)
        self.beginnings = tuple(map(tuple, beginnings(statements, tokenizer, config.max_position_embeddings)))
        self.table = nnx.Param(jnp.zeros((len(self.statements), count, config.hidden_size)))  # [V, n, D]

    def tokens(self, ids, text_encoder=None):
        # The longest statement that the ids begin with: one may be the beginning of another.
        ids = first_ids(ids)
        begin = [len(row) * (ids[:, : len(row)] == jnp.array(row)).all(axis=1) for row in self.beginnings]
        return self.table[jnp.argmax(jnp.stack(begin, axis=1), axis=1)]

    def untrained(self, sd) -> np.ndarray:
        """The table [V, n, D] to start from: the text encoder's states of each statement, from its end on.

        The first is that of the end: of one tower the pooled one. The others, of the padding, have its meaning at
        another place: equal tokens would stay equal.
        """
        ids, count = sd.tokenize(self.statements), self.count
        end = (first_ids(ids) == sd.tokenizer.eos_token_id).argmax(axis=1)
        if (room := self.config.max_position_embeddings - end.max()) < count:
            raise ValueError(f"config.value_encoder.tokens={count}: the model has room for {room} after a statement")
        graph, params = split(sd.text_encoder)
        states = jax.jit(lambda params, ids: nnx.merge(graph, params)(ids).last_hidden_state)(params, ids)
        width = self.config.hidden_size  # what Stable Diffusion 3 has beyond it is zeros
        rows = [row[e : e + count, :width] for row, e in zip(sharding.fetch(states), end)]
        return np.stack(rows).astype(np.float32)

    @classmethod
    def make(cls, config, sd):
        principles = values.load_principles(config)
        statements = [value.statement for value in principles]
        if config.data.attributes:  # then these are read too
            statements += [values.attributed(v.statement, a) for v in principles for a in v.attributes]
        count = config.value_encoder.tokens
        return cls(sd.text_encoder.config, statements=statements, tokenizer=sd.tokenizer, count=count)

    @classmethod
    def start(cls, config, sd, mesh):
        value_encoder = cls.make(config, sd)
        value_encoder.table[...] = value_encoder.untrained(sd)
        return sharding.replicate(value_encoder, mesh)

    @classmethod
    def files(cls) -> list[str]:
        return [EXPORTED, cls.FILE, f"value_encoder/{cls.FILE}"]

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | os.PathLike, sd, *, sharding=None) -> "SoftTokens":
        """Loads what `save` wrote, for a StableDiffusion.

        Args:
            path_or_hub_id: with value_tokens.safetensors, at the root or in value_encoder/, as an export has it.
            sharding: where they go; the default device if None.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it is damaged, or of a model of another width. A warning says if the model that it names as
                its own is another than this.
        """
        import safetensors

        root = find_repository(path_or_hub_id, cls.files())
        check_export(root, sd)
        file = next((file for place in (root, root / "value_encoder") if (file := place / cls.FILE).is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{root} has no {cls.FILE}.{describe(root)}")
        tensors = open_tensors([file])
        with safetensors.safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata() or {}
        config = sd.text_encoder.config
        shape = tensors["table"].shape if "table" in tensors else ()
        statements = metadata.get("statements", "").split("\n")
        if len(shape) != 3 or shape[0] != len(statements):
            raise ValueError(f"{file}: a table {shape} for the values {statements}, it must be [values, tokens, width]")
        if shape[2] != config.hidden_size:
            raise ValueError(
                f"{file}, of {metadata.get('base')!r}, has tokens of width {shape[2]}; those of {sd.root} are"
                f" {config.hidden_size} wide"
            )
        value_encoder = cls(config, statements=statements, tokenizer=sd.tokenizer, count=shape[1])
        table = np.asarray(tensors["table"], np.float32)
        value_encoder.table[...] = put(table, for_each_leaf(sharding, table))
        check_base(file, metadata.get("base"), sd)
        return set_exported(value_encoder, file.with_name("config.json"))

    def save(self, directory: pathlib.Path, base: str):
        """Writes the table and, as metadata, the statements that its rows are for."""
        directory.mkdir(parents=True, exist_ok=True)
        metadata = {"format": "pt", "base": base, "statements": "\n".join(self.statements)}
        write_safetensors({"table": np.asarray(self.table[...])}, directory / self.FILE, metadata=metadata)
