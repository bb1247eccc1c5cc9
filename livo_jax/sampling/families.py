"""What differs between Stable Diffusion 1.x and 2.x, XL and 3: sampling, training, cache, plan and export ask here."""

import abc
import pathlib
import re
import warnings

import numpy as np

from livo_jax.diffusion import FlowSchedule, NoiseSchedule, check_scheduler, for_latents
from livo_jax.files.modules import PARTS, read_config
from livo_jax.files.repositories import check_links, describe, read_json, read_t5_tokenizer, read_tokenizer
from livo_jax.models.clip import CLIPTextConfigs, CLIPTextModels, CLIPTextModelWithProjection
from livo_jax.models.sd3_text import SD3TextModels


class Family(abc.ABC):
    """That of a model's directory, by its configs. Nothing of it depends on weights.

    KEY: by which exports name it. NAME: for messages. DENOISER: the part that denoises. SAMPLER: that of a call that
    names none. GATED: whether feed-forward layers have gates.
    index: model_index.json. kinds: the class of each part, configs: their configs.

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: a config asks for what we do not compute, or the parts do not belong together.
    """

    KEY: str
    NAME: str
    DENOISER = "unet"
    SAMPLER = "dpmsolver++"
    LAYOUTS = ("padded", "official")
    GATED = True
    WORD = "UNet"  # what the part that denoises is called in messages
    OTHER_KINDS: dict = {}  # than PARTS has

    def __init__(self, root: pathlib.Path, index: dict):
        self.root, self.index = root, index
        self.kinds = {part: PARTS[part][0] for part in self.list_parts()} | self.OTHER_KINDS
        self.scheduler_file = root / "scheduler" / "scheduler_config.json"
        needed = [self.scheduler_file, *(root / part / "config.json" for part in self.kinds)]
        check_links(needed)
        if missing := [str(path.relative_to(root)) for path in needed if not path.is_file()]:
            what = f"\nIts model_index.json calls it a {index.get('_class_name')}" if index else describe(root)
            raise FileNotFoundError(
                f"{root} is no text-to-image Stable Diffusion in the diffusers layout: {', '.join(missing)} is"
                f" missing{what}{self.hint(missing)}"
            )
        published = read_json(self.scheduler_file)
        try:
            self.scheduler_config, self.schedule, notes = self.read_scheduler(published)
        except ValueError as error:
            raise ValueError(f"{self.scheduler_file}: {error}") from error
        if notes:
            warnings.warn(f"{self.scheduler_file}: {'; '.join(notes)}", stacklevel=6)
        # All configs are checked before the first weights are read.
        self.configs = {part: read_config(kind, root / part) for part, kind in self.kinds.items()}
        towers = tuple(self.configs[part] for part in ("text_encoder", "text_encoder_2") if part in self.configs)
        self.text = CLIPTextConfigs(towers) if len(towers) > 1 else towers[0]
        self.denoiser, self.vae = self.configs[self.DENOISER], self.configs["vae"]
        if problems := [*self.find_problems(), *self._problems_of_vae()]:
            raise ValueError(f"{root} is no text-to-image {self.NAME}: {'; '.join(problems)}")
        self.side = self.read_side()

    def _problems_of_vae(self) -> list[str]:
        vae, wanted, problems = self.vae, self.denoiser, []
        if not vae.in_channels == vae.out_channels == 3:
            problems.append(f"its VAE is of images of {vae.in_channels} channels, not red, green and blue")
        if not vae.latent_channels == wanted.in_channels == (wanted.out_channels or wanted.in_channels):
            problems.append(
                f"its VAE has {vae.latent_channels} latent channels, its {self.WORD} {wanted.in_channels} in and"
                f" {wanted.out_channels} out (inpainting and depth models have more in)"
            )
        return problems

    def hint(self, missing: list[str]) -> str:
        """What else to do where these files are missing."""
        return ""

    @abc.abstractmethod
    def list_parts(self) -> list[str]:
        """The names of its parts, of PARTS."""

    @abc.abstractmethod
    def read_scheduler(self, published: dict) -> tuple[dict, NoiseSchedule | FlowSchedule, list[str]]:
        """What samplers read of a scheduler_config.json, its schedule, and what is to be told. Raises ValueError."""

    @abc.abstractmethod
    def find_problems(self) -> list[str]:
        """Why parts of these configs do not belong together."""

    @abc.abstractmethod
    def read_side(self) -> int:
        """Height and width of the latents that it was trained on. Raises ValueError for what is no such size."""

    @property
    @abc.abstractmethod
    def multiple(self) -> int:
        """What divides the edges of its latents."""

    @property
    def most(self) -> int | None:
        """The longest edge of latents that it takes; None for any."""
        return None

    @property
    def states_shape(self) -> tuple[int, int]:
        """(L, D) of the states of a text."""
        return self.text.max_position_embeddings, self.text.hidden_size

    @property
    def pooled_width(self) -> int | None:
        """P of the pooled text; None where there is none."""
        return None

    @property
    def zeros_for_empty_prompt(self) -> bool:
        """Whether an empty negative prompt is zeros in the place of its states."""
        return False

    def time_ids(self, size: tuple[int, int]) -> np.ndarray | None:
        """The sizes [6] int32 that it is told of an image of a size in pixels, whole; None where it is told none."""
        return None

    def read_tokenizers(self) -> list[tuple]:
        """Of each text encoder the tokenizer, and how many tokens it reads.

        Raises ValueError where files are missing or damaged, or of another text encoder.
        """
        places = [self.root / name for name in ("tokenizer", "tokenizer_2")[: len(self.text.towers)]]
        tokenizers = [read_tokenizer(place) for place in places]
        for place, tokenizer in zip(places, tokenizers):
            if len(tokenizer) < 256:  # the bytes alone are more
                raise ValueError(f"{place} has no vocabulary: are vocab.json and merges.txt there?")
        for place, tokenizer, tower in zip(places, tokenizers, self.text.towers):
            check_vocabulary(place, tokenizer, tower.vocab_size)
        return [(tokenizer, self.text.max_position_embeddings) for tokenizer in tokenizers]

    def join_text_encoders(self, made: dict):
        """The text encoders among the parts that were made, as one module."""
        return made["text_encoder"]

    def positions(self, name: str, side: int, tokens: int) -> int:
        """At how many positions of an image a layer of the denoiser computes.

        Args:
            name: of a weight. side: of the latents. tokens: of the text.
        """
        levels = len(self.denoiser.block_out_channels)
        block, i, *_ = name.split(".")
        level = levels - 1 if block == "mid_block" else int(i) if block == "down_blocks" else levels - 1 - int(i)
        return tokens if "attn2.to_k" in name or "attn2.to_v" in name else (side // 2**level) ** 2


def check_vocabulary(place: pathlib.Path, tokenizer, embeddings: int):
    """Raises ValueError for tokens past the last embedding: they would read another's."""
    if len(tokenizer) > embeddings:
        raise ValueError(f"{place} has {len(tokenizer)} tokens, its text encoder {embeddings} embeddings")


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
        warnings.warn(f"{file}: sample_size={size} of diffusers before 0.9 is taken as 64", stacklevel=7)
        return 64
    return side


class StableDiffusion1(Family):
    """1.x and 2.x: a text encoder and a UNet."""

    KEY, NAME = "sd1", "Stable Diffusion 1.x, 2.x or XL"

    def list_parts(self):
        return ["text_encoder", "unet", "vae"]

    def read_scheduler(self, published):
        check_scheduler(published.get("_class_name"))
        config, notes = for_latents(published, self.KEY == "sdxl")
        return config, NoiseSchedule.from_json(config), notes

    def find_problems(self):
        problems = []
        if self.text.hidden_size != self.denoiser.cross_attention_dim:
            problems.append(
                f"its text encoder is {self.text.hidden_size} wide, its UNet wants {self.denoiser.cross_attention_dim}"
            )
        if self.denoiser.addition_embed_type and len(self.text.towers) == 1:
            told = "does not list" if self.index else "would list, but it is missing: fetch it too"
            problems.append(f"its UNet wants the pooled text of a text_encoder_2, which model_index.json {told}")
        return problems

    @property
    def multiple(self):
        return 2 ** (len(self.denoiser.block_out_channels) - 1)

    def read_side(self):
        return latent_size(self.root, self.KEY == "sdxl", len(self.denoiser.block_out_channels))


class StableDiffusionXL(StableDiffusion1):
    """XL: two text encoders, whose pooled text, with sizes, its UNet is told too."""

    KEY = "sdxl"

    def list_parts(self):
        return ["text_encoder", "text_encoder_2", "unet", "vae"]

    def find_problems(self):
        problems, unet = super().find_problems(), self.denoiser
        if unet.addition_embed_type:
            given = self.pooled_width + 6 * unet.addition_time_embed_dim
            if given != (wanted := unet.projection_class_embeddings_input_dim):
                problems.append(f"its pooled text and sizes are {given} wide, its UNet wants {wanted}")
        return problems

    @property
    def pooled_width(self):
        return self.text.towers[1].projection_dim

    @property
    def zeros_for_empty_prompt(self):
        return self.index.get("force_zeros_for_empty_prompt", True)

    def time_ids(self, size):
        return np.array([*size, 0, 0, *size], np.int32) if self.denoiser.addition_embed_type else None

    def join_text_encoders(self, made):
        return CLIPTextModels(made["text_encoder"], made["text_encoder_2"])


class StableDiffusion3(Family):
    """3 and 3.5: a transformer trained by flow matching, two CLIPs, and T5 where model_index.json lists it.

    `max_sequence_length` in model_index.json is how many tokens T5 reads: 256, as diffusers' pipeline has it, where it
    says nothing. Where T5 is left out there are as many zeros.
    """

    KEY, NAME, DENOISER, WORD = "sd3", "Stable Diffusion 3", "transformer", "transformer"
    SAMPLER = "euler"
    LAYOUTS = ("padded",)
    GATED = False
    OTHER_KINDS = {"text_encoder": CLIPTextModelWithProjection}

    def __init__(self, root, index):
        self.length = index.get("max_sequence_length", 256)
        if type(self.length) is not int or self.length < 0:
            raise ValueError(f"{root / 'model_index.json'}: max_sequence_length={self.length!r}: 0 or more tokens")
        super().__init__(root, index)

    @property
    def has_t5(self) -> bool:
        if self.index:
            return (self.index.get("text_encoder_3") or [None])[0] is not None
        return (self.root / "text_encoder_3").is_dir()

    def list_parts(self):
        further = ["text_encoder_3"] if self.has_t5 else []
        return ["text_encoder", "text_encoder_2", *further, "transformer", "vae"]

    def hint(self, missing):
        if "text_encoder_3/config.json" in missing:
            return (
                "\nT5 may be left out, and zeros stand for its states: write"
                ' "text_encoder_3": [null, null] and "tokenizer_3": [null, null] in model_index.json'
            )
        return "\nThere is a unet/, which no Stable Diffusion 3 has" if (self.root / "unet").is_dir() else ""

    def read_scheduler(self, published):
        return published, FlowSchedule.from_json(published), []

    def find_problems(self):
        problems, wanted = [], self.denoiser
        if self.has_t5 and not self.length:
            problems.append("its T5 reads max_sequence_length=0 tokens: 1 or more")
        if (width := self.text.hidden_size) > wanted.joint_attention_dim:
            problems.append(f"its CLIPs are {width} wide, its transformer takes {wanted.joint_attention_dim} at most")
        if self.pooled_width != wanted.pooled_projection_dim:
            problems.append(
                f"its pooled text is {self.pooled_width} wide, its transformer wants {wanted.pooled_projection_dim}"
            )
        if self.has_t5 and (width := self.configs["text_encoder_3"].d_model) != wanted.joint_attention_dim:
            problems.append(f"its T5 is {width} wide, its transformer wants {wanted.joint_attention_dim}")
        if len({tower.max_position_embeddings for tower in self.text.towers}) > 1:
            problems.append("its CLIPs read texts of different lengths")
        return problems

    @property
    def multiple(self):
        return self.denoiser.patch_size

    @property
    def most(self):
        return self.denoiser.pos_embed_max_size * self.denoiser.patch_size

    def read_side(self):
        size = self.denoiser.sample_size
        if size < 1 or size % self.multiple or size > self.most:
            raise ValueError(
                f"{self.root / 'transformer' / 'config.json'}: sample_size={size}: it must be a multiple of"
                f" {self.multiple}, at most {self.most}"
            )
        return size

    @property
    def states_shape(self):
        return self.text.max_position_embeddings + self.length, self.denoiser.joint_attention_dim

    @property
    def pooled_width(self):
        return sum(tower.projection_dim for tower in self.text.towers)

    def read_tokenizers(self):
        found = super().read_tokenizers()
        if self.has_t5:
            place = self.root / "tokenizer_3"
            tokenizer = read_t5_tokenizer(place)
            check_vocabulary(place, tokenizer, self.configs["text_encoder_3"].vocab_size)
            found.append((tokenizer, self.length))
        return found

    def join_text_encoders(self, made):
        one, two, three = (made.get(name) for name in ("text_encoder", "text_encoder_2", "text_encoder_3"))
        return SD3TextModels(one, two, three, self.denoiser.joint_attention_dim, self.length)

    def positions(self, name, side, tokens):
        of_text = ("add_", "to_add_out", "ff_context", "context_embedder")
        return tokens if any(part in name for part in of_text) else (side // self.multiple) ** 2


def read_family(root: pathlib.Path) -> Family:
    """The family of a directory: what its model_index.json says, or else its parts. Errors as Family."""
    index = read_json(root / "model_index.json") if (root / "model_index.json").is_file() else {}
    parts = {name: index.get(name) or [None, None] for name in (*PARTS, "tokenizer", "tokenizer_2", "tokenizer_3")}
    if wrong := [f"{name}={x!r}" for name, x in parts.items() if not (isinstance(x, list) and len(x) == 2)]:
        raise ValueError(f"{root / 'model_index.json'}: {', '.join(wrong)}: [library, class] is wanted")
    pipeline, of_3 = str(index.get("_class_name")), parts["transformer"][1] == "SD3Transformer2DModel"
    if not index:
        of_3 = (root / "transformer").is_dir()
    if "StableDiffusion3" in pipeline or (of_3 and "StableDiffusion" not in pipeline):
        return StableDiffusion3(root, index)
    if parts["text_encoder_2"][0] is not None:
        return StableDiffusionXL(root, index)
    return StableDiffusion1(root, index)
