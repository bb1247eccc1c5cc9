"""StableDiffusion: a published model, and images of it."""

import functools
import pathlib
import re
import warnings

import jax.numpy as jnp
import numpy as np

from livo_jax.diffusion.schedule import NoiseSchedule, check_scheduler, for_latents
from livo_jax.files.loras import merge_loras
from livo_jax.files.modules import PARTS, initialise, load_module, read_config, read_dtype
from livo_jax.files.repositories import describe, find_repository, read_json, read_tokenizer, weight_patterns
from livo_jax.models.clip import CLIPTextConfigs, CLIPTextModels
from livo_jax.sampling.generate import Images, generate
from livo_jax.sampling.requests import requests_of
from livo_jax.value_encoders.base import values_by_prompt
from livo_jax.value_encoders.shelf import Shelf

# What is no weight, beside the configs.
DESCRIPTION = ["model_index.json", "tokenizer/*", "tokenizer_2/*", "scheduler/*.json"]


def latent_size(root: pathlib.Path, is_xl: bool, levels: int) -> int:
    """Height and width of the latents that a UNet was trained on, from sample_size in its config.json.

    An absent one or null is 64, of XL 128. diffusers before 0.9 wrote 32 for Stable Diffusions of 64, which
    StableDiffusionPipeline corrects.

    Raises:
        ValueError: it is no size of square latents that the UNet's levels can halve.
    """
    file = root / "unet" / "config.json"
    published = read_json(file)
    size = published.get("sample_size")
    if size is None:
        return 128 if is_xl else 64
    side = size[0] if isinstance(size, list) and len(size) == 2 and size[0] == size[1] else size
    if type(side) is not int or side < 1 or side % 2 ** (levels - 1):
        raise ValueError(
            f"{file}: sample_size={size!r}: square latents are drawn and trained on here, of one number, a multiple of"
            f" {2 ** (levels - 1)}. Write there the side of an image in pixels over the VAE's factor (8)"
        )
    version = re.match(r"0\.(\d+)\.", str(published.get("_diffusers_version")))
    if not is_xl and size == side < 64 and version and int(version[1]) < 9:
        warnings.warn(f"{file}: sample_size={size} of diffusers before 0.9 is taken as 64", stacklevel=3)
        return 64
    return side


class StableDiffusion:
    """A frozen Stable Diffusion 1.x, 2.x or XL.

    Attributes:
        text_encoder, unet, vae: Flax modules, called as their classes say. The text encoder of XL is of two towers.
        name: what it was asked for by. root: its directory.
        tokenizers: a transformers.CLIPTokenizer of each tower, tokenizer the first of them.
        scheduler_config: the published scheduler_config.json, with what diffusion.for_latents sets right. schedule:
            its NoiseSchedule.
        image_size: height and width in pixels for which the model was trained.
        latent_shape: (h, w, C) of such an image.
        time_ids: [6] int32, the sizes that the UNet of XL is told for such an image, whole; None of others.
        guidance_distilled: whether it is made for no guidance, which no file tells: False until it is set. A guidance
            scale above 1 is then warned of.
        zeros_for_empty_prompt: whether an empty negative prompt is zeros in the place of its states, as of XL.
    """

    def __init__(self, root: pathlib.Path, make_part, name: str = ""):
        """Assembles the parts of a diffusers directory; make_part(model class, directory) makes each."""
        self.root, self.name = root, name or str(root)
        index = read_json(root / "model_index.json") if (root / "model_index.json").is_file() else {}
        is_xl = (index.get("text_encoder_2") or [None])[0] is not None
        named = ["text_encoder", *(["text_encoder_2"] if is_xl else []), "unet", "vae"]
        parts = {part: PARTS[part][0] for part in named}
        file = root / "scheduler" / "scheduler_config.json"
        needed = [file, *(root / part / "config.json" for part in parts)]
        if missing := [str(path.relative_to(root)) for path in needed if not path.is_file()]:
            what = f"\nIts model_index.json calls it a {index.get('_class_name')}" if index else describe(root)
            raise FileNotFoundError(
                f"{root} is no text-to-image Stable Diffusion in the diffusers layout: {', '.join(missing)} is"
                f" missing{what}"
            )
        published = read_json(file)
        try:
            check_scheduler(published.get("_class_name"))
            self.scheduler_config, notes = for_latents(published, is_xl)
            self.schedule = NoiseSchedule.from_json(self.scheduler_config)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        if notes:
            warnings.warn(f"{file}: {'; '.join(notes)}", stacklevel=3)
        # All configs are checked before the first weights are read.
        configs = {part: read_config(kind, root / part) for part, kind in parts.items()}
        text, unet, vae = (configs[part] for part in ("text_encoder", "unet", "vae"))
        problems, two = [], configs.get("text_encoder_2")
        if two:
            text = CLIPTextConfigs((text, two))
        if text.hidden_size != unet.cross_attention_dim:
            problems.append(f"its text encoder is {text.hidden_size} wide, its UNet wants {unet.cross_attention_dim}")
        if unet.addition_embed_type and not two:
            problems.append("its UNet wants the pooled text of a text_encoder_2, which model_index.json does not list")
        elif unet.addition_embed_type:
            given = two.projection_dim + 6 * unet.addition_time_embed_dim
            if given != (wanted := unet.projection_class_embeddings_input_dim):
                problems.append(f"its pooled text and sizes are {given} wide, its UNet wants {wanted}")
        if not vae.in_channels == vae.out_channels == 3:
            problems.append(f"its VAE is of images of {vae.in_channels} channels, not red, green and blue")
        if not vae.latent_channels == unet.in_channels == unet.out_channels:
            problems.append(
                f"its VAE has {vae.latent_channels} latent channels, its UNet {unet.in_channels} in and"
                f" {unet.out_channels} out (inpainting and depth models have more in)"
            )
        if problems:
            raise ValueError(f"{root} is no text-to-image Stable Diffusion 1.x, 2.x or XL: {'; '.join(problems)}")
        side = latent_size(root, is_xl, len(unet.block_out_channels))
        places = [root / name for name in ("tokenizer", "tokenizer_2")[: len(text.towers)]]
        self.tokenizers = [read_tokenizer(place) for place in places]
        self.tokenizer = self.tokenizers[0]
        for place, tokenizer in zip(places, self.tokenizers):
            if len(tokenizer) < 256:  # the bytes alone are more
                raise ValueError(f"{place} has no vocabulary: are vocab.json and merges.txt there?")
        for place, tokenizer, tower in zip(places, self.tokenizers, text.towers):
            if len(tokenizer) > tower.vocab_size:  # an id past the last embedding would read another's
                raise ValueError(f"{place} has {len(tokenizer)} tokens, its text encoder {tower.vocab_size} embeddings")
        made = {part: make_part(kind, root / part) for part, kind in parts.items()}
        self.text_encoder, self.unet, self.vae = made["text_encoder"], made["unet"], made["vae"]
        if two:
            self.text_encoder = CLIPTextModels(self.text_encoder, made["text_encoder_2"])
        self.image_size = side * 2 ** (len(vae.block_out_channels) - 1)
        self.latent_shape = (side, side, vae.latent_channels)
        size = (self.image_size, self.image_size)
        self.time_ids = np.array([*size, 0, 0, *size], np.int32) if unet.addition_embed_type else None
        self.guidance_distilled = False
        self.zeros_for_empty_prompt = is_xl and index.get("force_zeros_for_empty_prompt", True)

    def shape_of(self, size: tuple[int, int] | None) -> tuple[tuple[int, int, int], np.ndarray | None]:
        """The latent shape (h, w, C), and the time_ids, of images of another size; None for that of training.

        Args:
            size: height and width in pixels.

        Raises:
            ValueError: the UNet's levels do not divide it.
        """
        if size is None:
            return self.latent_shape, self.time_ids
        side, _, C = self.latent_shape
        pixels = self.image_size // side  # of a latent, along an edge
        multiple = pixels * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if any(edge < multiple or edge % multiple for edge in size):
            raise ValueError(f"images of {size[0]} x {size[1]}: edges must be multiples of {multiple}")
        time_ids = None if self.time_ids is None else np.array([*size, 0, 0, *size], np.int32)
        return (size[0] // pixels, size[1] // pixels, C), time_ids

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id, dtype=jnp.float32, *, variant: str | None = None, sharding=None
    ) -> "StableDiffusion":
        """Loads a diffusers directory or hub repository.

        Args:
            dtype: of the weights; modules compute in it. float32, bfloat16, or on accelerators float16, in which a
                VAE whose config says force_upcast is float32.
            variant: "fp16" for the published half-precision files, which are half to fetch.
            sharding: a jax.sharding.Sharding that every weight goes to, or a function that makes one for each
                leaf of a part's tree (sharding.by_rules); the default device if None. Host memory holds one
                weight at a time.

        Raises:
            FileNotFoundError, ValueError: as `find_repository` and `load_module` say; an unknown scheduler or
                prediction type; parts that do not belong together.
        """
        files = [
            f"{part}/{name}"
            for part, (_, stem) in PARTS.items()
            for name in ("config.json", *weight_patterns(stem, variant))
        ]
        dtype = read_dtype(dtype)
        root = find_repository(path_or_hub_id, DESCRIPTION + files)
        load_part = functools.partial(load_module, dtype=dtype, variant=variant, sharding=sharding)
        return cls(root, load_part, str(path_or_hub_id))

    @classmethod
    def from_config(cls, path_or_hub_id, dtype=jnp.float32, *, seed: int = 0, sharding=None) -> "StableDiffusion":
        """The architecture, tokenizer and scheduler of a directory or hub repository, with random weights.

        For tests and benchmarks: pictures show nothing. Arguments and errors as in from_pretrained.
        """
        dtype = read_dtype(dtype)
        root = find_repository(path_or_hub_id, DESCRIPTION + [f"{part}/config.json" for part in PARTS])
        make_part = functools.partial(initialise, dtype=dtype, seed=seed, sharding=sharding)
        return cls(root, make_part, str(path_or_hub_id))

    def merge_loras(self, loras):
        """Merges LoRAs into the UNet and the text encoder, for good.

        Arguments and errors as files.loras.merge_loras has them: ["lcm-lora", "style.safetensors=0.8"].
        """
        self.text_encoder, self.unet = merge_loras(self.text_encoder, self.unet, loras)

    def tokenize(self, texts: list[str]) -> np.ndarray:
        """Token ids [B, L] int32, of XL [B, 2, L], padded and cut to the text encoder's length.

        What is cut is warned of.
        """
        length, found = self.text_encoder.config.max_position_embeddings, []
        for tokenizer in self.tokenizers:
            ids = np.full((len(texts), length), tokenizer.pad_token_id, np.int32)
            # Padding and cutting are settings of the tokenizer, which the data's threads share: neither is asked of it.
            for text, row, whole in zip(texts, ids, tokenizer(list(texts), verbose=False)["input_ids"]):
                row[: len(whole)] = whole[:length]
                if len(whole) > length:
                    row[-1] = whole[-1]
                    cut = tokenizer.decode(whole[length - 1 : -1])
                    warnings.warn(f"{text!r} is longer than {length} tokens; cut off: {cut!r}", stacklevel=2)
            found.append(ids)
        return found[0] if len(found) == 1 else np.stack(found, axis=1)

    def generate(
        self,
        prompts,
        values=None,
        value_encoder=None,
        *,
        strength=1.0,
        keep_probability: float | None = None,
        ratio=None,
        rates=None,
        retriever=None,
        seed: int = 0,
        **settings,
    ) -> Images:
        """Images of prompts, the n-th occurrence of a prompt being its n-th image.

        Args:
            prompts: list of str.
            values: what the value encoder is to read before each prompt ("gender equality"): one for all, or a list
                with an entry for each prompt, which is None, a value or a list of values. None leaves the image as it
                is without LiVO. "auto" has the retriever choose.
            value_encoder: one of livo_jax.value_encoders; or a Shelf of value_encoders.shelf, whose values go by name.
            strength: how much of a value's effect: 0 is the base model, 1 LiVO. A number, or a dict of value -> number.
            keep_probability: the share of each prompt's images that its values are applied to; None for all, and with
                "auto" for what principles.toml says.
            ratio: which attributes the images of bias values should show, in the place of keep_probability: "equal", a
                table as {"round": 0.7, "square": 0.3}, or a JSON file of one. Reached over all images of the call, and
                over those of each prompt, as nearly as their number allows.
            rates: what the value encoder's tokens show, which a ratio needs: the path of a run's eval/rates.json.
            retriever: a values.Retriever; the default one if None.
            seed: of the noise, and of which images these are; 0 to 2**63 - 1.
            settings: steps, guidance_scale, sampler, prompt_layout, batch_size, mesh: as
                generate.generate has them.

        Returns:
            [N, H, W, 3] uint8, with an attribute `applied`: for each image the values applied to it, as Doses of
            value, strength and reason.
        """
        values = values_by_prompt(values, len(prompts))
        if isinstance(value_encoder, Shelf):
            values, strength, value_encoder = value_encoder.take(values, strength)
        options = dict(strength=strength, keep_probability=keep_probability, retriever=retriever)
        requests = requests_of(prompts, values, seed, ratio, rates, **options)
        images = generate(self, requests, value_encoder, seed=seed, **settings).view(Images)
        images.applied = [request.values for request in requests]
        return images
