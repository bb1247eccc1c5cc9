"""Published models on disk or hub <-> modules: the diffusers directory layout, safetensors only."""

import json
import os
import pathlib
import warnings
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from livo_jax.diffusion import NoiseSchedule
from livo_jax.generate import generate, requests_of
from livo_jax.models.clip import CLIPTextModel
from livo_jax.models.unet import UNet2DConditionModel
from livo_jax.models.vae import AutoencoderKL
from livo_jax.models.weights import from_published, split, to_published

# Schedulers whose files describe the noise schedule that our samplers read.
SCHEDULERS = frozenset(
    "DDIMScheduler DDPMScheduler DPMSolverMultistepScheduler DPMSolverSinglestepScheduler"
    " EulerAncestralDiscreteScheduler EulerDiscreteScheduler HeunDiscreteScheduler LMSDiscreteScheduler"
    " PNDMScheduler UniPCMultistepScheduler".split()
)


def find(path_or_hub_id: str | os.PathLike, patterns: list[str]) -> pathlib.Path:
    """The local directory of a model: itself, or a snapshot of a hub repository.

    Args:
        path_or_hub_id: a directory, or "owner/name" on the Hugging Face hub. HF_HOME and
            HF_HUB_OFFLINE mean what they mean to huggingface_hub.
        patterns: the files that are fetched from the hub.

    Raises:
        FileNotFoundError: it is neither; the message says how to fetch it.
    """
    local = pathlib.Path(path_or_hub_id)
    if local.is_dir():
        return local
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return pathlib.Path(snapshot_download(str(path_or_hub_id), allow_patterns=patterns))
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"no model at {str(path_or_hub_id)!r}: it is not a directory here, and not in the hub's cache or not"
            f" reachable ({type(error).__name__}). Fetch it where there is a network, with\n"
            f"  hf download {path_or_hub_id}\nor give the path of a copy in the diffusers layout."
        ) from error


def read_json(path: pathlib.Path) -> dict:
    """A JSON object. Raises FileNotFoundError or ValueError that name the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a model directory has the diffusers layout")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


class Tensors(Mapping):
    """The tensors of a component's safetensors files, each read when it is asked for."""

    def __init__(self, directory: pathlib.Path):
        import safetensors

        names = sorted(p.name for p in directory.glob("*.safetensors"))
        full = [name for name in names if ".fp16." not in name]  # beside its half-precision variant
        self.files = [directory / name for name in full or names]
        if not self.files:
            raise FileNotFoundError(f"{directory} has no .safetensors file (other formats can run code: not read)")
        self.home = {}
        for path in self.files:
            try:
                handle = safetensors.safe_open(path, framework="numpy")
                self.home |= dict.fromkeys(handle.keys(), handle)
            except safetensors.SafetensorError as error:
                raise ValueError(f"{path} is damaged or cut short, fetch it again: {error}") from error

    def __getitem__(self, name):
        return self.home[name].get_tensor(name)

    def __iter__(self):
        return iter(self.home)

    def __len__(self):
        return len(self.home)


def load(model_class, directory: pathlib.Path, dtype=jnp.float32):
    """A module with the weights of a component directory (config.json, *.safetensors).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the config asks for what we do not compute, a file is damaged, or weights are
            missing, unexpected or misshapen; the message names the directory and all of them.
    """
    try:
        config = model_class.Config.from_json(read_json(directory / "config.json"))
        graph, abstract = split(nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0))))
        params = from_published(Tensors(directory), abstract, dtype)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    return nnx.merge(graph, params)


def save(module, directory: pathlib.Path, config: dict, *, stem: str, prefix: str = "", dtype=np.float32):
    """Writes a component directory: config.json and {stem}.safetensors, names after `prefix`."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: array.astype(dtype) for name, array in to_published(split(module)[1], prefix).items()}
    save_file(tensors, directory / f"{stem}.safetensors", metadata={"format": "pt"})


class ValueEncoder(CLIPTextModel):
    """E_V: reads token ids [B, L] of "value, prompt"; its pooled output [B, D] is the value token."""

    @classmethod
    def from_pretrained(cls, path_or_hub_id, dtype=jnp.float32) -> "ValueEncoder":
        """Loads a CLIP text model, with or without the `text_model.` prefix on its names."""
        return load(cls, find(path_or_hub_id, ["*.json", "*.safetensors"]), dtype)


class StableDiffusion:
    """A frozen Stable Diffusion 1.x or 2.x.

    Attributes:
        text_encoder, unet, vae: Flax modules, called as their classes say.
        tokenizer: a transformers.CLIPTokenizer.
        scheduler_config: the published scheduler_config.json. schedule: its NoiseSchedule.
        image_size: height and width in pixels for which the model was trained.
    """

    def __init__(self, text_encoder, unet, vae, tokenizer, scheduler_config: dict, latent_size: int):
        self.text_encoder, self.unet, self.vae = text_encoder, unet, vae
        self.tokenizer, self.scheduler_config = tokenizer, scheduler_config
        self.schedule = NoiseSchedule.from_json(scheduler_config)
        self.image_size = latent_size * 2 ** (len(vae.config.block_out_channels) - 1)

    @classmethod
    def from_pretrained(cls, path_or_hub_id, dtype=jnp.float32) -> "StableDiffusion":
        """Loads a diffusers directory or hub repository.

        Args:
            dtype: of the weights; modules compute in it.

        Raises:
            FileNotFoundError, ValueError: as `find` and `load` say; an unknown scheduler or
                prediction type.
        """
        root = find(
            path_or_hub_id,
            ["model_index.json", "tokenizer/*", "scheduler/*.json"]
            + [f"{part}/*{kind}" for part in ("text_encoder", "unet", "vae") for kind in (".json", ".safetensors")],
        )
        scheduler_config = read_json(root / "scheduler" / "scheduler_config.json")
        if (name := scheduler_config.get("_class_name")) not in SCHEDULERS:
            raise ValueError(f"{root}: unknown scheduler {name!r}; known are {', '.join(sorted(SCHEDULERS))}")
        from transformers import CLIPTokenizer

        return cls(
            load(CLIPTextModel, root / "text_encoder", dtype),
            load(UNet2DConditionModel, root / "unet", dtype),
            load(AutoencoderKL, root / "vae", dtype),
            CLIPTokenizer.from_pretrained(root / "tokenizer"),
            scheduler_config,
            read_json(root / "unet" / "config.json").get("sample_size", 64),
        )

    def tokenize(self, texts: list[str]) -> np.ndarray:
        """Token ids [B, L] int32, padded and cut to the text encoder's length; what is cut is warned of."""
        length = self.text_encoder.config.max_position_embeddings
        ids = self.tokenizer(list(texts), truncation=True, max_length=length, padding="max_length")["input_ids"]
        for text in dict.fromkeys(t for t, row in zip(texts, ids) if row[-2] != self.tokenizer.pad_token_id):
            whole = self.tokenizer(text, verbose=False)["input_ids"]
            if len(whole) > length:
                cut = self.tokenizer.decode(whole[length - 1 : -1])
                warnings.warn(f"{text!r} is longer than {length} tokens; cut off: {cut!r}", stacklevel=2)
        return np.array(ids, np.int32)

    def generate(self, prompts, values=None, value_encoder=None, **settings) -> np.ndarray:
        """Images [N, H, W, 3] uint8 of prompts, the n-th occurrence of a prompt being its n-th image.

        Args:
            prompts: list of str.
            values: what the value encoder is to read before each prompt ("gender equality"): one for
                all, or one or None for each. None leaves the image as it is without LiVO.
            value_encoder: a ValueEncoder.
            settings: seed, steps, guidance_scale, sampler, batch_size, mesh: as generate.generate has them.
        """
        return generate(self, requests_of(prompts, values), value_encoder, **settings)
