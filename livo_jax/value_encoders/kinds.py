"""The kinds of value encoder, and what a run starts from."""

import functools

from flax import nnx

from livo_jax import sharding
from livo_jax.files.settings import import_named
from livo_jax.value_encoders.base import READING, TrainableTokens
from livo_jax.value_encoders.full import ValueEncoder
from livo_jax.value_encoders.lora import LoRA
from livo_jax.value_encoders.soft_tokens import SoftTokens

KINDS = {"full": ValueEncoder, "lora": LoRA, "token": SoftTokens}


def kind_of(config) -> type[TrainableTokens]:
    """The class of config.value_encoder.kind: one of KINDS, or of your own code, "package.module:Name".

    Raises:
        ValueError: there is no such kind, and those that there are; or it is no TrainableTokens.
    """
    kind = config.value_encoder.kind
    if ":" in kind:
        found = import_named(kind, "config.value_encoder.kind")
        if not (isinstance(found, type) and issubclass(found, TrainableTokens)):
            raise ValueError(
                f"config.value_encoder.kind={kind!r}: it is no subclass of livo_jax.value_encoders.TrainableTokens"
            )
        return found
    if kind not in KINDS:
        raise ValueError(f"config.value_encoder.kind={kind!r}: choose from {', '.join(KINDS)}")
    return KINDS[kind]


def make(config, sd) -> TrainableTokens:
    """A value encoder of config.value_encoder for a StableDiffusion, untrained. Errors as of its kind's make."""
    return kind_of(config).make(config, sd)


def start(config, sd, mesh) -> TrainableTokens:
    """The value encoder that training starts from, float32, on the mesh.

    That is config.value_encoder.start, or what gives the tokens of the model's text encoder.

    Raises:
        FileNotFoundError, ValueError: as the from_pretrained of its kind; config.value_encoder.start is of another
            kind, rank or values than the config, or config.value_encoder cannot work.
    """
    c, kind = config.value_encoder, kind_of(config)
    wanted = nnx.eval_shape(lambda: kind.make(config, sd))
    if not c.start:
        return kind.start(config, sd, mesh)
    place = functools.partial(sharding.by_rules, mesh=mesh, rules=kind.RULES)
    try:
        found = kind.from_pretrained(c.start, sd=sd, sharding=place)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"config.value_encoder.start holds no {c.kind!r} value encoder: {error}") from error
    if differences := [
        f"{name}: {theirs} there, {ours} in the config"
        for name in found.SETTINGS
        if (theirs := getattr(found, name)) != (ours := getattr(wanted, name))
    ]:
        raise ValueError(f"config.value_encoder.start={c.start!r} is another:\n  " + "\n  ".join(differences))
    # What has its kind's default may be no export, or one of before that says nothing: it reads as the config says.
    if different := [
        f"{name.removeprefix('moves_')}: {theirs} there, {ours} in the config"
        for name in READING
        if (theirs := getattr(found, name)) not in (getattr(type(found), name), ours := getattr(wanted, name))
    ]:
        raise ValueError(f"config.value_encoder.start={c.start!r} reads otherwise:\n  " + "\n  ".join(different))
    for name in (*READING, "alone", "trained_on"):  # as the untrained one, by which a trained one is restored
        setattr(found, name, getattr(wanted, name))
    return found
