"""The paper's value encoder: a text encoder of its own."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from livo_jax import sharding
from livo_jax.files.loras import merge_loras
from livo_jax.files.modules import load_module
from livo_jax.files.repositories import describe, find_repository, read_json, weight_patterns
from livo_jax.models.clip import CLIPTextConfig, CLIPTextConfigs, CLIPTextModel, CLIPTextModels
from livo_jax.models.quantised import whole
from livo_jax.models.weights import one_key, split
from livo_jax.value_encoders.base import (
    TrainableTokens,
    check_base,
    check_export,
    move_pooled,
    set_exported,
    set_reading,
    text_tokens,
)


class FullTokens(TrainableTokens):
    """Kind "full": a text encoder, or one for each of the model's, whose pooled output [B, D] is the value token."""

    RULES = sharding.RULES

    def tokens(self, ids, text_encoder=None):
        return text_tokens(self, ids, self.states)

    def pooled_shift(self, ids, text_encoder):
        return move_pooled(self, ids, text_encoder) if self.moves_pooled else None

    @classmethod
    def make(cls, config, sd):
        return set_reading(untrained(sd.text_encoder.config), config)

    @classmethod
    def start(cls, config, sd, mesh):
        if config.random_weights:  # copied, for training gives the arrays of its state away
            return set_reading(copy_of(sd.text_encoder), config)
        place = functools.partial(sharding.by_rules, mesh=mesh)
        own = {"subfolder": "text_encoder", "variant": config.variant or None}
        found = cls.from_pretrained(config.model, **own, sharding=place)
        return set_reading(merge_loras(found, None, config.loras)[0] if config.loras else found, config)

    @classmethod
    def files(cls, subfolder: str = "", variant=None) -> list[str]:
        places = [subfolder, f"{subfolder}_2"] if subfolder else ["", "value_encoder", "value_encoder_2"]
        names = ["config.json", *weight_patterns("model", variant)]
        return [f"{place}/{name}".lstrip("/") for place in places for name in names]

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id, dtype=jnp.float32, *, sd=None, subfolder: str = "", variant=None, sharding=None
    ) -> "FullTokens":
        """Loads a CLIP text model, with or without the `text_model.` prefix on its names.

        Args:
            sd: the StableDiffusion that it is used on, if that is to be compared: a warning says if the model that an
                export names as its own is another.
            subfolder: where it is ("text_encoder" of a Stable Diffusion). If empty, at the root or in
                value_encoder/, as an export has it. Where SUBFOLDER_2 is beside it, a ValueEncoders of both.
            dtype, variant, sharding: as StableDiffusion.from_pretrained has them.
        """
        root = find_repository(path_or_hub_id, cls.files(subfolder, variant))
        check_export(root, sd)
        places = [subfolder] if subfolder else ["", "value_encoder"]
        place = next((place for place in places if (root / place / "config.json").is_file()), None)
        if place is None:
            raise FileNotFoundError(f"{root / places[0]} has no config.json of a text encoder.{describe(root)}")
        if sd:
            check_base(root, (read_json(root / place / "config.json").get("livo") or {}).get("base"), sd)
        tower = functools.partial(load_module, dtype=dtype, variant=variant, sharding=sharding)
        if place and (root / f"{place}_2").is_dir():
            value_encoder = ValueEncoders(tower(CLIPTextModel, root / place), tower(CLIPTextModel, root / f"{place}_2"))
        else:
            value_encoder = tower(ValueEncoder, root / place)
        return set_exported(value_encoder, root / place / "config.json")


class ValueEncoder(FullTokens, CLIPTextModel):
    """The paper's: a text encoder of its own."""


class ValueEncoders(FullTokens, CLIPTextModels):
    """That of XL: a text encoder beside each of the model's, whose pooled outputs together are the token."""


def untrained(config: CLIPTextConfig | CLIPTextConfigs) -> ValueEncoder | ValueEncoders:
    if len(config.towers) > 1:
        return ValueEncoders(*(CLIPTextModel(tower, rngs=one_key()) for tower in config.towers))
    return ValueEncoder(config, rngs=one_key())


def copy_of(text_encoder) -> ValueEncoder | ValueEncoders:
    """A value encoder, float32, whose token is the pooled output of a text encoder: its copy."""
    graph, abstract = split(nnx.eval_shape(lambda: untrained(text_encoder.config)))
    theirs = dict(jax.tree_util.tree_leaves_with_path(split(whole(text_encoder))[1]))

    def copied(path, _):
        return jnp.array(theirs[path], jnp.float32, copy=True)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(copied, abstract))
