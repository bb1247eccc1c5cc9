"""Published models on disk or hub <-> modules: the diffusers directory layout, safetensors only."""

import json
import os
import pathlib
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from livo_jax.diffusion import NoiseSchedule
from livo_jax.generate import Images, generate, requests_of
from livo_jax.models.clip import CLIPTextConfigs, CLIPTextModel, CLIPTextModels, CLIPTextModelWithProjection
from livo_jax.models.unet import UNet2DConditionModel
from livo_jax.models.vae import AutoencoderKL
from livo_jax.models.weights import for_each_leaf, from_published, one_key, put, split, to_published

# Schedulers whose files describe the noise schedule that our samplers read.
SCHEDULERS = frozenset(
    "DDIMScheduler DDPMScheduler DPMSolverMultistepScheduler DPMSolverSinglestepScheduler"
    " EulerAncestralDiscreteScheduler EulerDiscreteScheduler HeunDiscreteScheduler LMSDiscreteScheduler"
    " PNDMScheduler UniPCMultistepScheduler".split()
)
# The parts of a Stable Diffusion, and what their weight files are called.
PARTS = {
    "text_encoder": (CLIPTextModel, "model"),
    "text_encoder_2": (CLIPTextModelWithProjection, "model"),  # of XL alone
    "unet": (UNet2DConditionModel, "diffusion_pytorch_model"),
    "vae": (AutoencoderKL, "diffusion_pytorch_model"),
}

# What is no weight, beside the configs.
DESCRIPTION = ["model_index.json", "tokenizer/*", "tokenizer_2/*", "scheduler/*.json"]


def find(path_or_hub_id: str | os.PathLike, patterns: list[str]) -> pathlib.Path:
    """The local directory of a model: itself, or a snapshot of a hub repository.

    Args:
        path_or_hub_id: a directory, or "owner/name" on the Hugging Face hub. HF_HOME, HF_ENDPOINT,
            HF_TOKEN and HF_HUB_OFFLINE mean what they mean to huggingface_hub.
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


# ---------------------------------------------------------------------------- weight files


def weight_patterns(stem: str, variant: str | None) -> list[str]:
    """The files of one set of weights: whole, or an index and its shards (both ways to name them)."""
    dot = f".{variant}" if variant else ""
    shard = "?????-of-?????"
    names = (f"{stem}{dot}", f"{stem}{dot}-{shard}", f"{stem}-{shard}{dot}")
    return [f"{name}.safetensors" for name in names] + [f"{stem}.safetensors.index{dot}.json"]


def weight_files(directory: pathlib.Path, stem: str, variant: str | None) -> list[pathlib.Path]:
    """The safetensors files of a component; without a variant asked for, half precision where it lies alone.

    Raises:
        FileNotFoundError: there are none, or a shard is missing.
    """
    for dot in [f".{variant}"] if variant else ["", ".fp16"]:
        index = directory / f"{stem}.safetensors.index{dot}.json"
        if index.is_file():
            shards = [directory / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
            if missing := [shard.name for shard in shards if not shard.is_file()]:
                raise FileNotFoundError(f"{directory} lacks the shards {', '.join(missing)} that {index.name} lists")
            return shards
        if (whole := directory / f"{stem}{dot}.safetensors").is_file():
            return [whole]
    others = sorted(p.name for p in directory.glob("*") if p.suffix in (".safetensors", ".bin", ".ckpt", ".msgpack"))
    raise FileNotFoundError(
        f"{directory} has no {stem}{f'.{variant}' if variant else ''}.safetensors (variant={variant!r}). There"
        f" {'are ' + ', '.join(others) if others else 'is none'}. Formats other than safetensors can run code: not"
        " read. Where the hub has half precision alone, ask for variant='fp16'"
    )


class Tensor(NamedTuple):
    """A tensor in a safetensors file, which np.asarray reads."""

    path: pathlib.Path
    name: str
    shape: tuple

    def __array__(self, dtype=None, copy=None):
        import safetensors

        # Opened anew each time: a mapping that stays open keeps every page that was read in memory.
        with safetensors.safe_open(self.path, framework="numpy") as file:
            return np.asarray(file.get_tensor(self.name), dtype)


def open_tensors(files: list[pathlib.Path]) -> dict[str, Tensor]:
    """The tensors of safetensors files, by name. Raises ValueError for a damaged file."""
    import safetensors

    tensors = {}
    for path in files:
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                tensors |= {name: Tensor(path, name, tuple(file.get_slice(name).get_shape())) for name in file.keys()}
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut short, fetch it again: {error}") from error
    return tensors


# ---------------------------------------------------------------------------- components


def read_config(model_class, directory: pathlib.Path):
    """The config of a component. Raises ValueError for what we do not compute, naming the directory."""
    try:
        return model_class.Config.from_json(read_json(directory / "config.json"))
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error


def skeleton(model_class, directory: pathlib.Path):
    """A component without weights: the graph of its module, and the tree of its parameters' shapes."""
    config = read_config(model_class, directory)
    return split(nnx.eval_shape(lambda: model_class(config, rngs=one_key())))


def load(model_class, directory: pathlib.Path, dtype=jnp.float32, *, variant=None, sharding=None):
    """A module with the weights of a component directory (config.json, safetensors).

    Args:
        dtype, variant, sharding: as StableDiffusion.from_pretrained has them.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the config asks for what we do not compute, a file is damaged, or weights are
            missing, unexpected or misshapen; the message names the directory and all of them.
    """
    # transformers calls the file of whatever it publishes "model".
    stem = next((stem for known, stem in PARTS.values() if issubclass(model_class, known)), "model")
    graph, abstract = skeleton(model_class, directory)
    try:
        tensors = open_tensors(weight_files(directory, stem, variant))
        params = from_published(tensors, abstract, dtype, sharding)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    return nnx.merge(graph, params)


def initialise(model_class, directory: pathlib.Path, dtype=jnp.float32, *, seed: int = 0, sharding=None):
    """A module of a component directory's config.json with random weights, the same in every dtype."""
    graph, abstract = skeleton(model_class, directory)
    rng = np.random.default_rng(seed)

    def draw(path, leaf, sharding):  # on the host: hundreds of small draws on a device are as many compilations
        kind = path[-1].key
        if kind in ("kernel", "embedding"):
            deviation = 0.02 if kind == "embedding" else np.prod(leaf.shape[:-1]) ** -0.5
            array = deviation * rng.standard_normal(leaf.shape, np.float32)
        else:
            array = np.full(leaf.shape, kind == "scale", np.float32)
        return put(array.astype(dtype), sharding)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, abstract, for_each_leaf(sharding, abstract)))


def save(module, directory: pathlib.Path, config: dict, *, stem: str, prefix: str = "", dtype=np.float32):
    """Writes a component directory: config.json and {stem}.safetensors, names after `prefix`."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: array.astype(dtype) for name, array in to_published(split(module)[1], prefix).items()}
    save_file(tensors, directory / f"{stem}.safetensors", metadata={"format": "pt"})


class StableDiffusion:
    """A frozen Stable Diffusion 1.x, 2.x or XL.

    Attributes:
        text_encoder, unet, vae: Flax modules, called as their classes say. The text encoder of XL is of two towers.
        name: what it was asked for by. root: its directory.
        tokenizers: a transformers.CLIPTokenizer of each tower, tokenizer the first of them.
        scheduler_config: the published scheduler_config.json. schedule: its NoiseSchedule.
        image_size: height and width in pixels for which the model was trained.
        latent_shape: (h, w, C) of such an image.
        time_ids: [6] int32, the sizes that the UNet of XL is told for such an image, whole; None of others.
        zeros_for_empty_prompt: whether an empty negative prompt is zeros in the place of its states, as of XL.
    """

    def __init__(self, root: pathlib.Path, make_part, name: str = ""):
        """Assembles the parts of a diffusers directory; make_part(model class, directory) makes each."""
        self.root, self.name = root, name or str(root)
        scheduler_config = read_json(root / "scheduler" / "scheduler_config.json")
        if (name := scheduler_config.get("_class_name")) not in SCHEDULERS:
            raise ValueError(f"{root}: unknown scheduler {name!r}; known are {', '.join(sorted(SCHEDULERS))}")
        self.scheduler_config, self.schedule = scheduler_config, NoiseSchedule.from_json(scheduler_config)
        index = read_json(root / "model_index.json") if (root / "model_index.json").is_file() else {}
        is_xl = index.get("text_encoder_2", [None])[0] is not None
        # All configs are checked before the first weights are read.
        parts = {part: kind for part, (kind, _) in PARTS.items() if is_xl or part != "text_encoder_2"}
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
        if not vae.latent_channels == unet.in_channels == unet.out_channels:
            problems.append(
                f"its VAE has {vae.latent_channels} latent channels, its UNet {unet.in_channels} in and"
                f" {unet.out_channels} out (inpainting and depth models have more in)"
            )
        if problems:
            raise ValueError(f"{root} is no Stable Diffusion 1.x, 2.x or XL: {'; '.join(problems)}")
        from transformers import CLIPTokenizer

        places = [root / name for name in ("tokenizer", "tokenizer_2")[: len(text.towers)]]
        self.tokenizers = [CLIPTokenizer.from_pretrained(place) for place in places]
        self.tokenizer = self.tokenizers[0]
        for place, tokenizer in zip(places, self.tokenizers):
            if len(tokenizer) < 256:  # the bytes alone are more; without its files transformers makes an empty one
                raise ValueError(f"{place} has no vocabulary: are vocab.json and merges.txt there?")
        made = {part: make_part(kind, root / part) for part, kind in parts.items()}
        self.text_encoder, self.unet, self.vae = made["text_encoder"], made["unet"], made["vae"]
        if two:
            self.text_encoder = CLIPTextModels(self.text_encoder, made["text_encoder_2"])
        latent_size = read_json(root / "unet" / "config.json").get("sample_size", 64)
        self.image_size = latent_size * 2 ** (len(vae.block_out_channels) - 1)
        self.latent_shape = (latent_size, latent_size, vae.latent_channels)
        size = (self.image_size, self.image_size)
        self.time_ids = np.array([*size, 0, 0, *size], np.int32) if unet.addition_embed_type else None
        self.zeros_for_empty_prompt = is_xl and index.get("force_zeros_for_empty_prompt", True)

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id, dtype=jnp.float32, *, variant: str | None = None, sharding=None
    ) -> "StableDiffusion":
        """Loads a diffusers directory or hub repository.

        Args:
            dtype: of the weights; modules compute in it.
            variant: "fp16" for the published half-precision files, which are half to fetch.
            sharding: a jax.sharding.Sharding that every weight goes to, or a function that makes one for each
                leaf of a part's tree (sharding.by_rules); the default device if None. Host memory holds one
                weight at a time.

        Raises:
            FileNotFoundError, ValueError: as `find` and `load` say; an unknown scheduler or
                prediction type; parts that do not belong together.
        """
        files = [
            f"{part}/{name}"
            for part, (_, stem) in PARTS.items()
            for name in ("config.json", *weight_patterns(stem, variant))
        ]
        root = find(path_or_hub_id, DESCRIPTION + files)
        make = lambda kind, place: load(kind, place, dtype, variant=variant, sharding=sharding)
        return cls(root, make, str(path_or_hub_id))

    @classmethod
    def from_config(cls, path_or_hub_id, dtype=jnp.float32, *, seed: int = 0, sharding=None) -> "StableDiffusion":
        """The architecture, tokenizer and scheduler of a directory or hub repository, with random weights.

        For tests and benchmarks: pictures show nothing. Arguments and errors as in from_pretrained.
        """
        root = find(path_or_hub_id, DESCRIPTION + [f"{part}/config.json" for part in PARTS])
        make = lambda kind, place: initialise(kind, place, dtype, seed=seed, sharding=sharding)
        return cls(root, make, str(path_or_hub_id))

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
            value_encoder: one of livo_jax.value_encoders; or a livo_jax.shelf.Shelf, whose values go by name.
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
        if hasattr(value_encoder, "take"):  # a Shelf
            values, strength, value_encoder = value_encoder.take(values, strength)
        options = dict(strength=strength, keep_probability=keep_probability, retriever=retriever)
        requests = requests_of(prompts, values, seed, ratio, rates, **options)
        images = generate(self, requests, value_encoder, seed=seed, **settings).view(Images)
        images.applied = [request.values for request in requests]
        return images
