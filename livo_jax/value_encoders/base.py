"""What every value encoder is: it makes the tokens that go before the prompt's of "value, prompt"."""

import abc
import pathlib
import warnings

import jax.numpy as jnp
from flax import nnx

from livo_jax import sharding
from livo_jax.files.repositories import read_json
from livo_jax.models.clip import CLIPTextModel, CLIPTextModels, end_of_text, first_ids, outputs_of
from livo_jax.models.weights import split
from livo_jax.value_encoders import gates
from livo_jax.value_encoders.gates import Gate
from livo_jax.values.principles import load_principles, own_statement, value_prompt

WIDTHS = ("hidden_size", "vocab_size", "max_position_embeddings")

EXPORTED = "value_encoder/config.json"  # of any kind, in an export
READING = ("states", "reads_prompt", "moves_pooled")  # how a value encoder reads and gives, in an export too


class ValueTokens(nnx.Module):
    """A value encoder of any kind.

    config: of the text encoder that it belongs to; FITS: the fields of it that must be the model's.
    statements: of the values that it knows; None: of any.
    reads_prompt: whether its ids are of "value, prompt", or of the value alone. alone: the statements of values that
        it reads without the prompt in either case. states: how many tokens it gives, as text_tokens has them, where it
        reads a text. moves_pooled: whether it moves the pooled text of XL and 3 too. trained_on: the statements of the
        values that it was trained with; None where nobody says. gates: of statements, where they were measured.
    RULES: by which its parameters are divided over a mesh.
    """

    FITS: tuple[str, ...] = WIDTHS
    RULES = sharding.WHOLE
    statements: tuple[str, ...] | None = None
    states, reads_prompt, alone, moves_pooled = 1, True, (), False
    trained_on: tuple[str, ...] | None = None
    gates: tuple[tuple[str, Gate], ...] = ()

    def text(self, statement: str | None, prompt: str) -> str:
        """What it reads of a value or an attribute of it; of None, an empty place, the prompt."""
        reads_prompt = self.reads_prompt and not (statement and own_statement(statement) in self.alone)
        return value_prompt(statement, prompt if reads_prompt else "")

    @abc.abstractmethod
    def tokens(self, ids, text_encoder):
        """The tokens [B, n, D] float32 of ids [B, L] int32, of XL [B, 2, L]; text_encoder: the model's, frozen."""

    def pooled_shift(self, ids, text_encoder):
        """What it adds to the pooled text [B, P] float32 for ids as of tokens; None where it leaves that alone."""
        return None

    def seen(self, ids):
        """Which of the tokens [B, n] bool are no padding; None for all."""
        return None


class TrainableTokens(ValueTokens):
    """A value encoder that config.value_encoder names by its kind.

    SETTINGS: what config.value_encoder says of it, beside the kind.
    """

    SETTINGS: tuple[str, ...] = ()

    @classmethod
    @abc.abstractmethod
    def make(cls, config, sd) -> "TrainableTokens":
        """A value encoder of config.value_encoder for a StableDiffusion, with shapes that matter and weights to be set.

        Raises:
            ValueError: it cannot be.
        """

    @classmethod
    @abc.abstractmethod
    def start(cls, config, sd, mesh) -> "TrainableTokens":
        """The value encoder that training starts from without config.value_encoder.start, float32, on the mesh."""

    @classmethod
    @abc.abstractmethod
    def files(cls) -> list[str]:
        """Where its files may lie in a directory or hub repository."""

    @classmethod
    @abc.abstractmethod
    def from_pretrained(cls, path_or_hub_id, *, sd=None, sharding=None) -> "TrainableTokens":
        """Loads what an export wrote, for a StableDiffusion."""


def strip_unread(value_encoder: ValueTokens) -> ValueTokens:
    """The same without what no program reads: value encoders that differ in that alone share one."""
    # Where they are set, if only to (), they are in the graph.
    there = [name for name in ("alone", "trained_on", "gates") if name in vars(value_encoder)]
    if not there:
        return value_encoder
    bare = nnx.merge(*split(value_encoder))
    for name in there:
        delattr(bare, name)
    return bare


def set_reading(value_encoder: ValueTokens, config) -> ValueTokens:
    """Has a value encoder read, and give, what config.value_encoder says.

    Raises:
        ValueError: it says what cannot be.
    """
    c, length = config.value_encoder, value_encoder.config.max_position_embeddings
    if not 0 <= c.states <= length:
        raise ValueError(f"config.value_encoder.states={c.states}: choose 0 (all) to {length}")
    if c.pooled and len(value_encoder.config.towers) == 1:
        raise ValueError("config.value_encoder.pooled=True: models of one text encoder read no pooled text")
    if set(c.alone) - {"bias", "harm"}:
        raise ValueError(f"config.value_encoder.alone={tuple(c.alone)!r}: choose from 'bias', 'harm'")
    value_encoder.states, value_encoder.reads_prompt, value_encoder.moves_pooled = c.states, c.reads_prompt, c.pooled
    known = load_principles(config)
    value_encoder.alone = tuple(value.statement for value in known if value.kind in c.alone)
    value_encoder.trained_on = tuple(value.statement for value in known)
    return value_encoder


def text_tokens(encoder: CLIPTextModel | CLIPTextModels, ids, states: int):
    """The value tokens [B, n, D] of what a text encoder reads: its pooled output, the paper's one token.

    Args:
        states: more than 1 are the last hidden states from the end of the text on, 0 all of them; of several towers
            those of each, side by side.
    """
    if states == 1:
        return encoder(ids).pooled[:, None]
    towers, L = encoder.config.towers, encoder.config.max_position_embeddings
    if len(towers) == 1:
        hidden = encoder(ids).last_hidden_state
    else:
        hidden = jnp.concatenate([text.last_hidden_state for text in outputs_of(encoder.towers, ids)], axis=-1)
    if states == 0:
        return hidden
    places = jnp.minimum(end_of_text(first_ids(ids)[:, :L], towers[0])[:, None] + jnp.arange(states), L - 1)
    return jnp.take_along_axis(hidden, places[:, :, None], axis=1)


def move_pooled(encoder: CLIPTextModels, ids, text_encoder):
    """How far the pooled text [B, P] float32 of what the encoder reads moves from the text encoder's, projected by it.

    So before training it is nothing but rounding, and it needs no weights of its own. Esser et al. 2024, section 5: the
    pooled text modulates every block of Stable Diffusion 3, which a token reaches by attention alone.
    """
    ours, theirs = outputs_of(encoder.towers, ids), outputs_of(text_encoder.towers, ids)
    moved = [
        tower.text_projection((own.pooled - frozen.pooled).astype(jnp.float32))
        for own, frozen, tower in zip(ours, theirs, text_encoder.towers)
        if hasattr(tower, "text_projection")  # XL projects its second's alone
    ]
    return jnp.concatenate(moved, axis=-1)


def values_by_prompt(values, number: int | None = None) -> list[tuple[str, ...]]:
    """The values of each prompt, () for none and ("auto",) for those that a retriever is to find.

    Args:
        values: None, or a value for all prompts; or a list with an entry for each prompt, which is None, a value or a
            list of values.
        number: of prompts; any if None, of a value for all 1.

    Raises:
        ValueError: there are not as many entries as prompts, or "auto" is beside other values.
    """
    if values is None or isinstance(values, str):
        values = [values] * (1 if number is None else number)
    if number not in (None, len(values)):
        raise ValueError(
            f"{len(values)} values for {number} prompts: give one for all, or a list with an entry for each"
            " prompt, which is None, a value or a list of values"
        )
    rows = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in values]
    for row in rows:
        if "auto" in row and len(row) > 1:
            raise ValueError(f"values={[*row]!r}: 'auto' stands alone")
    return rows


def check_base(path, base: str | None, sd):
    """Warns where the model that a value encoder names as its own is another than the one that it is used on."""
    names = (sd.name, str(sd.root), sd.root.resolve().name)  # exports name a directory without its path
    if base and base not in names and pathlib.Path(base).expanduser().resolve() != sd.root.resolve():
        warnings.warn(
            f"{path} was trained on {base!r} and is used on {sd.name!r}: it fits by its shapes, but is of use only if"
            " the one is a copy of the other",
            stacklevel=3,
        )


def set_exported(value_encoder: ValueTokens, path: pathlib.Path) -> ValueTokens:
    """Has a value encoder do and know what an export's config.json says; nothing where there is none."""
    livo = (read_json(path).get("livo") or {}) if path.is_file() else {}
    known = livo.get("values") or []
    for name in READING:
        if livo.get(name, getattr(value_encoder, name)) != getattr(value_encoder, name):
            setattr(value_encoder, name, livo[name])
    value_encoder.alone = tuple(value["statement"] for value in known if value.get("alone"))
    value_encoder.trained_on = tuple(value["statement"] for value in known) or None
    value_encoder.gates = gates.from_json(livo.get("gates"))
    return value_encoder


def check_export(root: pathlib.Path, sd=None):
    """Warns of an export whose pipeline.py deals values out as livo_jax did before dealing.py.

    Raises ValueError for one of another family than the StableDiffusion's: XL and 3 have CLIPs of the same shapes.
    """
    exported = read_json(root / EXPORTED).get("livo") if (root / EXPORTED).is_file() else None
    family = (exported or {}).get("family")  # since there are more than one whose shapes are the same
    if sd and family and family != sd.family.KEY:
        raise ValueError(
            f"{root} is a value encoder of family {family!r}, of {exported['base']!r}, and {sd.name} is of"
            f" {sd.family.KEY!r} ({sd.family.NAME}): train one for this model"
        )
    if exported and "dealing" not in exported:
        warnings.warn(
            f"{root} was exported by a livo_jax that dealt two values of a prompt to the same images, or to opposite"
            " ones, never independently. Here they are dealt independently; its pipeline.py still does as then: export"
            " the run again",
            stacklevel=3,
        )


def check_value_encoder(sd, value_encoder, statements=()):
    """Raises ValueError unless the value encoder fits this model and knows the values of these statements.

    One that reads texts takes any, as new values; it warns of those that it was not trained with: they may be misspelt.
    """
    if value_encoder.statements and (unknown := sorted(set(statements) - set(value_encoder.statements))):
        raise ValueError(f"the value encoder knows {', '.join(value_encoder.statements)}, not {', '.join(unknown)}")

    trained_on = value_encoder.trained_on
    if trained_on and (new := sorted({text for text in statements if own_statement(text) not in trained_on})):
        warnings.warn(
            f"{', '.join(map(repr, new))}: the value encoder was not trained with that, and reads it as any text. It"
            f" was with {', '.join(map(repr, trained_on))}",
            stacklevel=3,
        )

    def of(config, name: str) -> str:
        return " and ".join(str(getattr(tower, name)) for tower in config.towers)

    differences = [
        f"{name}: {theirs} in the value encoder, {ours} in the text encoder of {sd.name}"
        for name in value_encoder.FITS
        if (theirs := of(value_encoder.config, name)) != (ours := of(sd.text_encoder.config, name))
    ]
    if differences:
        raise ValueError("the value encoder was made for another model:\n  " + "\n  ".join(differences))
