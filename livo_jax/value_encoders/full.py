"""The paper's value encoder: a text encoder of its own."""

import functools

import jax.numpy as jnp

from livo_jax import sharding
from livo_jax.files.modules import load
from livo_jax.files.repositories import describe, find, read_json, weight_patterns
from livo_jax.models.clip import CLIPTextModel, CLIPTextModels
from livo_jax.value_encoders.base import WIDTHS, check_base, check_dealing, text_tokens


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
