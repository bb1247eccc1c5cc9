"""Value encoders, of three kinds: each makes the tokens that go before the prompt's of "value, prompt".

All have tokens(ids, text_encoder), which takes ids [B, L] int32 (of XL [B, 2, L]) and the model's frozen text encoder
and returns [B, n, D] float32, and

    config      of the text encoder that it belongs to; FITS: the fields of it that must be the model's
    files()     where its files may lie in a directory or hub repository
    statements  of the values that it knows; None: of any
    RULES       by which its parameters are divided over a mesh
    SETTINGS    what config.value_encoder says of it, beside the kind
    reads_prompt   whether the ids are of "value, prompt", or of the value alone
"""

import functools
import json
import os
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from livo_jax import seeds, sharding, values
from livo_jax.model_files import describe, find, open_tensors, read_json, weight_patterns
from livo_jax.models import low_rank
from livo_jax.models.clip import CLIPTextConfig, CLIPTextConfigs, CLIPTextModel, CLIPTextModels, end_of_text, first_ids
from livo_jax.models.weights import from_published, one_key, put, split, to_published
from livo_jax.pretrained import load

WIDTHS = ("hidden_size", "vocab_size", "max_position_embeddings")
EXPORTED = "value_encoder/config.json"  # of any kind, in an export


def text_tokens(encoder: CLIPTextModel | CLIPTextModels, ids, states: int):
    """The value tokens [B, n, D] of what a text encoder reads: its pooled output, the paper's one token.

    Args:
        states: more than 1 are the last hidden states from the end of the text on, 0 all of them; of one tower alone.
    """
    text, L = encoder(ids), ids.shape[-1]
    if states == 1:
        return text.pooled[:, None]
    if states == 0:
        return text.last_hidden_state
    places = jnp.minimum(end_of_text(ids, encoder.config)[:, None] + jnp.arange(states), L - 1)
    return jnp.take_along_axis(text.last_hidden_state, places[:, :, None], axis=1)


class ValueEncoder(CLIPTextModel):
    """The paper's, kind "full": a text encoder of its own, whose pooled output [B, D] is the value token."""

    FITS, RULES, SETTINGS, statements = WIDTHS, sharding.RULES, (), None
    states, reads_prompt = 1, True

    def tokens(self, ids, text_encoder=None):
        return text_tokens(self, ids, self.states)

    @staticmethod
    def files(subfolder: str = "", variant=None) -> list[str]:
        places = [subfolder, f"{subfolder}_2"] if subfolder else ["", "value_encoder", "value_encoder_2"]
        names = ["config.json", *weight_patterns("model", variant)]
        return [f"{place}/{name}".lstrip("/") for place in places for name in names]

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id, dtype=jnp.float32, *, sd=None, subfolder: str = "", variant=None, sharding=None
    ) -> "ValueEncoder":
        """Loads a CLIP text model, with or without the `text_model.` prefix on its names.

        Args:
            sd: the StableDiffusion that it is used on, if that is to be compared: a warning says if the model that an
                export names as its own is another.
            subfolder: where it is ("text_encoder" of a Stable Diffusion). If empty, at the root or in
                value_encoder/, as an export has it. Where SUBFOLDER_2 is beside it, a ValueEncoders of both.
            dtype, variant, sharding: as StableDiffusion.from_pretrained has them.
        """
        root = find(path_or_hub_id, cls.files(subfolder, variant))
        places = [subfolder] if subfolder else ["", "value_encoder"]
        place = next((place for place in places if (root / place / "config.json").is_file()), None)
        if place is None:
            raise FileNotFoundError(f"{root / places[0]} has no config.json of a text encoder.{describe(root)}")
        if sd:
            check_base(root, read_json(root / place / "config.json").get("livo", {}).get("base"), sd)
        tower = functools.partial(load, dtype=dtype, variant=variant, sharding=sharding)
        check_dealing(root)
        if place and (root / f"{place}_2").is_dir():
            return ValueEncoders(tower(CLIPTextModel, root / place), tower(CLIPTextModel, root / f"{place}_2"))
        return tower(cls, root / place)


class ValueEncoders(CLIPTextModels):
    """Kind "full" for XL: a text encoder beside each of the model's, whose pooled outputs together are the token."""

    FITS, RULES, SETTINGS, statements = WIDTHS, sharding.RULES, (), None
    states, reads_prompt, tokens = 1, True, ValueEncoder.tokens


class LoRA(nnx.Module):
    """Kind "lora": the frozen text encoder, its kernels W as W + alpha / rank * A B (Hu et al. 2022).

    Args:
        text_encoder: of the model; its shapes are used.
        rank: columns of A and rows of B.
        targets: names of the layers that are updated, of TARGETS.

    Raises:
        ValueError: a rank or alpha below any use, targets that there are not; all are listed.
    """

    TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    FITS, RULES = (*WIDTHS, "intermediate_size", "num_hidden_layers"), sharding.WHOLE
    SETTINGS, statements = ("rank", "alpha", "targets"), None
    states, reads_prompt = 1, True
    UNSUPPORTED = (  # fields of an adapter_config.json that ask for another computation
        "use_rslora use_dora use_qalora lora_bias fan_in_fan_out modules_to_save rank_pattern alpha_pattern"
        " layers_to_transform layer_replication exclude_modules target_parameters trainable_token_indices".split()
    )
    PREFIX = "base_model.model."  # of peft's names, which end as the layers of today's transformers are called
    FILES = ("adapter_config.json", "adapter_model.safetensors")

    def __init__(self, text_encoder: CLIPTextModel | CLIPTextModels, *, rank: int, alpha: float, targets, rngs):
        problems = [f"target {name!r}: choose from {', '.join(self.TARGETS)}" for name in {*targets} - {*self.TARGETS}]
        if rank < 1 or alpha <= 0 or not targets:
            problems.append(f"rank={rank}, alpha={alpha}, {len(targets)} targets: each must be above 0")
        if problems:
            raise ValueError("lora cannot work: " + "; ".join(problems))
        self.config, self.rank, self.alpha, self.targets = text_encoder.config, rank, alpha, tuple(sorted(targets))
        self.updates = low_rank.updates(text_encoder, targets, rank, rngs)

    def tokens(self, ids, text_encoder):
        # It computes in float32 from its embeddings on; a layer widens its kernel as it computes.
        graph, params = split(text_encoder)
        widened = lambda path, x: x if path[-1].key == "kernel" else x.astype(jnp.float32)
        text_encoder = nnx.merge(graph, jax.tree_util.tree_map_with_path(widened, params))
        return text_tokens(low_rank.updated(text_encoder, self.updates, self.alpha / self.rank), ids, self.states)

    def merged(self, text_encoder):
        """The text encoder with the updates in its weights, float32: to be saved."""
        return low_rank.merged(text_encoder, self.updates, self.alpha / self.rank)

    @classmethod
    def files(cls) -> list[str]:
        return [EXPORTED, *(f"{place}{name}" for place in ("", "adapter/", "adapter_2/") for name in cls.FILES)]

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | os.PathLike, sd, *, sharding=None) -> "LoRA":
        """Loads an adapter of peft for the text encoder of a StableDiffusion.

        Args:
            path_or_hub_id: with adapter_config.json and adapter_model.safetensors, at the root or in adapter/, as
                an export has it; for XL those of the second tower in adapter_2/.
            sharding: where its weights go; the default device if None.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it does what we do not compute, or is of another text encoder. A warning says if the model
                that it names as its own is another than this.
        """
        root = find(path_or_hub_id, cls.files())
        check_dealing(root)
        root = root / "adapter" if (root / "adapter").is_dir() else root
        parts = _parts(sd.text_encoder)
        # Of other folders a name that ends in _2 may be another adapter's.
        second = [_second(root)] if root.name == "adapter" or len(parts) > 1 else []
        roots = [root, *(place for place in second if place.is_dir())]
        settings, bases = zip(*map(cls._settings, roots))
        fits = f"{root}, an adapter of {bases[0]!r}, does not fit {sd.root}"
        if len(roots) != len(parts):
            raise ValueError(f"{fits}: it is for {len(roots)} text encoders, there are {len(parts)}")
        if settings[0] != settings[-1]:
            raise ValueError(f"{root} and {roots[-1].name} are of two kinds: {settings[0]} and {settings[-1]}")
        graph, abstract = split(nnx.eval_shape(lambda: cls(sd.text_encoder, **settings[0], rngs=one_key())))
        ours = lambda name: name.removeprefix(cls.PREFIX).removeprefix("text_model.")
        tensors = {
            f"updates.{part}{ours(name)}": tensor
            for place, part in zip(roots, parts)
            for name, tensor in open_tensors([place / cls.FILES[1]]).items()
        }
        try:
            value_encoder = nnx.merge(graph, from_published(tensors, abstract, jnp.float32, sharding))
        except ValueError as error:
            raise ValueError(f"{fits}/text_encoder: {error}") from error
        check_base(root, bases[0], sd)
        return value_encoder

    @classmethod
    def _settings(cls, root: pathlib.Path) -> tuple[dict, str]:
        """Rank, alpha and targets of an adapter, and the model that it is of."""
        if missing := [name for name in cls.FILES if not (root / name).is_file()]:
            raise FileNotFoundError(f"{root} has no {' and no '.join(missing)}.{describe(root)}")
        published = read_json(root / cls.FILES[0])
        problems = [f"{name}={published[name]!r}" for name in cls.UNSUPPORTED if published.get(name)]
        targets, kind, bias = (published.get(name) for name in ("target_modules", "peft_type", "bias"))
        if (kind, bias) != ("LORA", "none") or not isinstance(targets, list):
            problems.append(f"peft_type={kind!r}, bias={bias!r}, target_modules={targets!r}")
        if problems:
            raise ValueError(f"{root / cls.FILES[0]}: not supported: {', '.join(problems)}")
        # Each layer may be named alone, as diffusers names them: all of a kind must be there, or weights are missing.
        targets = sorted({name.rpartition(".")[2] for name in targets})
        settings = dict(rank=published.get("r", 8), alpha=published.get("lora_alpha", 8), targets=targets)
        return settings, published.get("base_model_name_or_path")

    def save(self, directory: pathlib.Path, base: str):
        """Writes adapter_config.json and adapter_model.safetensors, which peft loads on the text encoder of `base`.

        Those of a second text encoder are written to DIRECTORY_2.
        """
        from safetensors.numpy import save_file

        settings = {
            "peft_type": "LORA", "base_model_name_or_path": base, "r": self.rank, "lora_alpha": self.alpha,
            "target_modules": list(self.targets), "bias": "none", "inference_mode": True,
        }  # fmt: skip
        updates = to_published(split(self)[1]["updates"])
        # transformers has the second text encoder, with its projection, around a text_model.
        prefixes = (self.PREFIX, f"{self.PREFIX}text_model.")
        for place, part, prefix in zip((directory, _second(directory)), _parts(self), prefixes):
            place.mkdir(parents=True, exist_ok=True)
            (place / self.FILES[0]).write_text(json.dumps(settings, indent=2) + "\n")
            published = {prefix + n.removeprefix(part): x for n, x in updates.items() if n.startswith(part)}
            save_file(published, place / self.FILES[1], metadata={"format": "pt"})


def _parts(module) -> tuple[str, ...]:
    """What the names of each tower's weights begin with in a module of one tower or of two."""
    return ("text_encoder.", "text_encoder_2.") if len(module.config.towers) > 1 else ("",)


def _second(directory: pathlib.Path) -> pathlib.Path:
    """Where what is for the second tower lies, beside what is for the first."""
    return directory.with_name(f"{directory.name}_2")


def check_base(path, base: str | None, sd):
    """Warns where the model that a value encoder names as its own is another than the one that it is used on."""
    if base and base not in (sd.name, str(sd.root)) and pathlib.Path(base).expanduser().resolve() != sd.root.resolve():
        warnings.warn(
            f"{path} was trained on {base!r} and is used on {sd.name!r}: it fits by its shapes, but is of use only if"
            " the one is a copy of the other",
            stacklevel=3,
        )


def check_dealing(root: pathlib.Path):
    """Warns of an export whose pipeline.py deals values out as livo_jax did before dealing.py."""
    exported = read_json(root / EXPORTED).get("livo") if (root / EXPORTED).is_file() else None
    if exported and "dealing" not in exported:
        warnings.warn(
            f"{root} was exported by a livo_jax that dealt two values of a prompt to the same images, or to opposite"
            " ones, never independently. Here they are dealt independently; its pipeline.py still does as then: export"
            " the run again",
            stacklevel=3,
        )


def beginnings(statements, tokenizer, length: int) -> list[list[int]]:
    """The token ids that texts of so many tokens begin with, which read these statements before a prompt."""
    ids = tokenizer([values.value_prompt(statement, "") for statement in statements])["input_ids"]
    return [row[:-1][: length - 1] for row in ids]


class SoftTokens(nnx.Module):
    """Kind "token": n learned tokens of each value (Lester et al. 2021), whatever the prompt.

    Args:
        config: of the text encoder.
        statements: the values, which ids are told by that begin with one.
        tokenizer: the model's.
        count: how many tokens a value has.

    Raises:
        ValueError: no statements, or no tokens.
    """

    FITS, RULES, SETTINGS = WIDTHS, sharding.WHOLE, ("count", "statements")
    reads_prompt = True  # its rows are told by how the ids begin
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
        if (room := ids.shape[-1] - end.max()) < count:
            raise ValueError(f"config.value_encoder.tokens={count}: the model has room for {room} after a statement")
        graph, params = split(sd.text_encoder)
        states = jax.jit(lambda params, ids: nnx.merge(graph, params)(ids).last_hidden_state)(params, ids)
        return np.stack([row[e : e + count] for row, e in zip(sharding.fetch(states), end)]).astype(np.float32)

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

        root = find(path_or_hub_id, cls.files())
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
        value_encoder.table[...] = put(np.asarray(tensors["table"], np.float32), sharding)
        check_base(file, metadata.get("base"), sd)
        check_dealing(root)
        return value_encoder

    def save(self, directory: pathlib.Path, base: str):
        """Writes the table and, as metadata, the statements that its rows are for."""
        from safetensors.numpy import save_file

        directory.mkdir(parents=True, exist_ok=True)
        metadata = {"format": "pt", "base": base, "statements": "\n".join(self.statements)}
        save_file({"table": np.asarray(self.table[...])}, directory / self.FILE, metadata=metadata)


KINDS = {"full": ValueEncoder, "lora": LoRA, "token": SoftTokens}


def full(config: CLIPTextConfig | CLIPTextConfigs) -> ValueEncoder | ValueEncoders:
    """A value encoder of kind "full", whose shapes matter: its weights are to be set."""
    if len(config.towers) > 1:
        return ValueEncoders(*(CLIPTextModel(tower, rngs=one_key()) for tower in config.towers))
    return ValueEncoder(config, rngs=one_key())


def copy_of(text_encoder) -> ValueEncoder | ValueEncoders:
    """A value encoder of kind "full", float32, whose token is the pooled output of a text encoder: its copy."""
    graph, abstract = split(nnx.eval_shape(lambda: full(text_encoder.config)))
    theirs = dict(jax.tree_util.tree_leaves_with_path(split(text_encoder)[1]))
    copied = lambda path, _: jnp.array(theirs[path], jnp.float32, copy=True)
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(copied, abstract))


def make(config, sd):
    """A value encoder of config.value_encoder for a StableDiffusion, untrained; of kind "full" as `full` has it."""
    c, text = config.value_encoder, sd.text_encoder.config
    if c.kind == "full":
        return reading(config, full(text))
    if c.kind == "lora":
        settings = dict(rank=c.rank, alpha=c.alpha, targets=c.targets)
        return reading(config, LoRA(sd.text_encoder, **settings, rngs=nnx.Rngs(seeds.key(config.seed))))
    if c.kind == "token":
        principles = values.load(config.principles)
        statements = [value.statement for value in principles]
        if config.data.attributes:  # then these are read too
            statements += [values.attributed(v.statement, a) for v in principles for a in v.attributes]
        return SoftTokens(text, statements=statements, tokenizer=sd.tokenizer, count=c.tokens)
    raise ValueError(f"config.value_encoder.kind={c.kind!r}: choose from {', '.join(KINDS)}")


def reading(config, value_encoder):
    """A value encoder of kind "full" or "lora", which reads and gives what config.value_encoder says.

    Raises:
        ValueError: it says what cannot be.
    """
    c, length = config.value_encoder, value_encoder.config.max_position_embeddings
    towers = len(value_encoder.config.towers)
    if not 0 <= c.states <= length or (c.states != 1 and towers > 1):
        raise ValueError(
            f"config.value_encoder.states={c.states}: choose 0 (all) to {length} of one text encoder, 1 of several;"
            f" there are {towers}"
        )
    value_encoder.states, value_encoder.reads_prompt = c.states, c.reads_prompt
    return value_encoder


def start(config, sd, mesh):
    """The value encoder that training starts from, float32, on the mesh.

    That is config.value_encoder.start, or what gives the tokens of the model's text encoder.

    Raises:
        FileNotFoundError, ValueError: as the from_pretrained of its kind; config.value_encoder.start is of another
            kind, rank or values than the config, or config.value_encoder cannot work.
    """
    c, whole = config.value_encoder, sharding.replicated(mesh)
    by_rules = functools.partial(sharding.by_rules, mesh=mesh)
    wanted = nnx.eval_shape(lambda: make(config, sd))
    if c.start:
        try:
            if c.kind == "full":
                return reading(config, ValueEncoder.from_pretrained(c.start, sd=sd, sharding=by_rules))
            found = KINDS[c.kind].from_pretrained(c.start, sd, sharding=whole)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"config.value_encoder.start holds no {c.kind!r} value encoder: {error}") from error
        if differences := [
            f"{name}: {theirs} there, {ours} in the config"
            for name in found.SETTINGS
            if (theirs := getattr(found, name)) != (ours := getattr(wanted, name))
        ]:
            raise ValueError(f"config.value_encoder.start={c.start!r} is another:\n  " + "\n  ".join(differences))
        return found if c.kind == "token" else reading(config, found)
    if c.kind == "full" and not config.random_weights:
        own = {"subfolder": "text_encoder", "variant": config.variant or None}
        return reading(config, ValueEncoder.from_pretrained(config.model, **own, sharding=by_rules))
    if c.kind == "full":  # copied, for training gives the arrays of its state away
        return reading(config, copy_of(sd.text_encoder))
    value_encoder = make(config, sd)
    if c.kind == "token":
        value_encoder.table[...] = value_encoder.untrained(sd)
    graph, params = split(value_encoder)
    return nnx.merge(graph, jax.tree.map(lambda x: put(np.asarray(x), whole), params))
