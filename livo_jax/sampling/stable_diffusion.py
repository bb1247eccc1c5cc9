"""StableDiffusion: a published model, and images of it."""

import functools
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from livo_jax.files.loras import merge_loras
from livo_jax.files.modules import PARTS, initialise, load_module, read_dtype
from livo_jax.files.repositories import find_repository, weight_patterns
from livo_jax.models.quantised import DTYPES, quantised
from livo_jax.models.weights import split
from livo_jax.sampling.families import read_family
from livo_jax.sampling.generate import Images, generate
from livo_jax.sampling.requests import as_prompts, requests_of
from livo_jax.sharding import replicated
from livo_jax.value_encoders.base import values_by_prompt
from livo_jax.value_encoders.shelf import Shelf

# What is no weight, beside the configs.
DESCRIPTION = ["model_index.json", "tokenizer/*", "tokenizer_2/*", "tokenizer_3/*", "scheduler/*.json"]


@functools.partial(jax.jit, static_argnums=0)
def _means(vae, params, images):
    """[N, h, w, C] float32, of images [N, H, W, 3] uint8; vae: its GraphDef."""
    mean, _ = nnx.merge(vae, params).encode(images.astype(jnp.float32) / 127.5 - 1)
    return mean.astype(jnp.float32)


@functools.cache  # kernels that are alike share a program
def _quantiser(dtype, kernel_lies, scale_lies):
    import qwix

    def run(kernel):
        found = qwix.quantize(kernel.astype(jnp.float32), dtype, channelwise_axes=(kernel.ndim - 1,))
        return found.qvalue, found.scale

    return jax.jit(run, out_shardings=(kernel_lies, scale_lies))


def quantise(kernel, dtype) -> tuple[jax.Array, jax.Array]:
    """A kernel [..., O] in a dtype of 8 bits, which lies as it did; its scales [..., O], float32, whole everywhere."""
    if isinstance(kernel, jax.ShapeDtypeStruct):  # plans have no more
        return jax.eval_shape(_quantiser(dtype, None, None), kernel)
    divided = isinstance(kernel.sharding, jax.sharding.NamedSharding)
    scale_lies = replicated(kernel.sharding.mesh) if divided else kernel.sharding
    return _quantiser(dtype, kernel.sharding, scale_lies)(kernel)


class StableDiffusion:
    """A frozen Stable Diffusion 1.x, 2.x, XL or 3.

    Attributes:
        text_encoder, unet, vae: Flax modules, called as their classes say. The text encoder of XL is of two towers,
            that of 3 has T5 beside them; the unet is what denoises, of 3 a transformer.
        family: the Family, which tells what differs between these.
        name: what it was asked for by. root: its directory.
        tokenizers: a transformers.CLIPTokenizer of each tower, and T5's, tokenizer the first of them. text_lengths: how
            many tokens of each are read.
        scheduler_config: the published scheduler_config.json, with what diffusion.for_latents sets right. schedule:
            its NoiseSchedule or FlowSchedule.
        image_size: height and width in pixels for which the model was trained.
        latent_shape: (h, w, C) of such an image.
        time_ids: [6] int32, the sizes that the UNet of XL is told for such an image, whole; None of others.
        guidance_distilled: whether it is made for no guidance, which no file tells: False until it is set. A guidance
            scale above 1 is then warned of.
        quantised: "" or the dtype that `quantise` took.
        zeros_for_empty_prompt: whether an empty negative prompt is zeros in the place of its states, as of XL.
    """

    def __init__(self, root: pathlib.Path, make_part, name: str = ""):
        """Assembles the parts of a diffusers directory; make_part(model class, directory) makes each."""
        self.root, self.name = root, name or str(root)
        self.family = family = read_family(root)
        self.scheduler_config, self.schedule = family.scheduler_config, family.schedule
        tokenizers = family.read_tokenizers()
        self.tokenizers, self.text_lengths = ([*column] for column in zip(*tokenizers))
        self.tokenizer = self.tokenizers[0]
        made = {part: make_part(kind, root / part) for part, kind in family.kinds.items()}
        self.text_encoder, self.unet, self.vae = family.join_text_encoders(made), made[family.DENOISER], made["vae"]
        self.image_size = family.side * 2 ** (len(family.vae.block_out_channels) - 1)
        self.latent_shape = (family.side, family.side, family.vae.latent_channels)
        self.time_ids = family.time_ids((self.image_size, self.image_size))
        self.guidance_distilled, self.quantised = False, ""
        self.zeros_for_empty_prompt = family.zeros_for_empty_prompt

    def shape_of(self, size: tuple[int, int] | None) -> tuple[tuple[int, int, int], np.ndarray | None]:
        """The latent shape (h, w, C), and the time_ids, of images of another size; None for that of training.

        Args:
            size: height and width in pixels.

        Raises:
            ValueError: the UNet's levels, or the transformer's patches, do not divide it, or it is too large.
        """
        if size is None:
            return self.latent_shape, self.time_ids
        side, _, C = self.latent_shape
        pixels = self.image_size // side  # of a latent, along an edge
        multiple, most = pixels * self.family.multiple, self.family.most
        if any(edge < multiple or edge % multiple for edge in size):
            raise ValueError(f"images of {size[0]} x {size[1]}: edges must be multiples of {multiple}")
        if most and max(size) > pixels * most:
            raise ValueError(f"images of {size[0]} x {size[1]}: edges must be at most {pixels * most}")
        return (size[0] // pixels, size[1] // pixels, C), self.family.time_ids(size)

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

        Arguments and errors as files.loras.merge_loras has them: ["lcm-lora", "style.safetensors=0.8"]. Those of
        Stable Diffusion 3 are not read.
        """
        if self.family.KEY == "sd3":
            raise ValueError(
                f"LoRAs {[*map(str, loras)]} for {self.name}: of Stable Diffusion 3 none are read; merge them by"
                " diffusers (load_lora_weights, fuse_lora, save_pretrained) and give what that saved"
            )
        if self.quantised:
            raise ValueError(f"{self.name} is quantised to {self.quantised}: merge LoRAs before")
        self.text_encoder, self.unet = merge_loras(self.text_encoder, self.unet, loras)

    def quantise(self, dtype: str):
        """Has all linear layers and convolutions keep weights of 8 bits, for good, and compute as before.

        Norms, biases and embeddings stay. Each output channel has a float32 scale, by its largest weight.

        Args:
            dtype: "int8" or "fp8" (float8_e4m3fn).

        Raises:
            ValueError: another dtype, or it is quantised already.
        """
        if dtype not in DTYPES:
            raise ValueError(f"quantised={dtype!r}: choose from {', '.join(DTYPES)}")
        if self.quantised:
            raise ValueError(f"{self.name} is quantised to {self.quantised} already: load it anew")
        for part in ("text_encoder", "unet", "vae"):
            setattr(self, part, quantised(getattr(self, part), functools.partial(quantise, dtype=DTYPES[dtype])))
        self.quantised = dtype

    def tokenize(self, texts: list[str] | str) -> np.ndarray:
        """Token ids [B, L] int32, of XL [B, 2, L], of 3 with T5 [B, 3, L], padded and cut to the text encoder's length.

        What is cut is warned of.
        """
        found, L, texts = [], max(self.text_lengths), as_prompts(texts)
        for tokenizer, length in zip(self.tokenizers, self.text_lengths):
            ids = np.full((len(texts), L), tokenizer.pad_token_id, np.int32)
            # Padding and cutting are settings of the tokenizer, which the data's threads share: neither is asked of it.
            for text, row, whole in zip(texts, ids, tokenizer(texts, verbose=False)["input_ids"]):
                row[: min(len(whole), length)] = whole[:length]
                if len(whole) > length:
                    row[length - 1] = whole[-1]
                    cut = tokenizer.decode(whole[length - 1 : -1])
                    warnings.warn(f"{text!r} is longer than {length} tokens; cut off: {cut!r}", stacklevel=2)
            found.append(ids)
        return found[0] if len(found) == 1 else np.stack(found, axis=1)

    def encode(self, images) -> jnp.ndarray:
        """Images [N, H, W, 3] uint8 as latents [N, h, w, C] float32, scaled as what denoises has them: their means."""
        graph, params = split(self.vae)
        return self.vae.config.scale(_means(graph, params, jnp.asarray(images)))

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
            prompts: list of str, or one.
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
            settings: steps, guidance_scale, sampler, prompt_layout, batch_size, mesh, gated: as generate.generate has
                them.

        Returns:
            [N, H, W, 3] uint8, with an attribute `applied`: for each image the values applied to it, as Doses of
            value, strength and reason.
        """
        prompts = as_prompts(prompts)
        values = values_by_prompt(values, len(prompts))
        if isinstance(value_encoder, Shelf):
            values, strength, value_encoder = value_encoder.take(values, strength)
        options = dict(strength=strength, keep_probability=keep_probability, retriever=retriever)
        requests = requests_of(prompts, values, seed, ratio, rates, **options)
        images = generate(self, requests, value_encoder, seed=seed, **settings).view(Images)
        images.applied = [request.values for request in requests]
        return images
