"""The kinds of value encoder, and what a run starts from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from livo_jax import seeds, sharding, values
from livo_jax.models.clip import CLIPTextConfig, CLIPTextConfigs, CLIPTextModel
from livo_jax.models.weights import one_key, put, split
from livo_jax.value_encoders.full import ValueEncoder, ValueEncoders
from livo_jax.value_encoders.lora import LoRA
from livo_jax.value_encoders.soft_tokens import SoftTokens

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
        principles = values.load_principles(config)
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
