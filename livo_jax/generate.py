"""The sampler as users call it: images of prompts, with and without the value token."""

import functools
import pathlib
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from livo_jax import diffusion, sharding
from livo_jax.models.weights import split
from livo_jax.values import text_hash, value_prompt


class Request(NamedTuple):
    """One image. Its noise depends on (seed, prompt, index) alone: with and without a value it is the same."""

    prompt: str
    index: int = 0
    value: str | None = None  # the statement that the value encoder reads; None leaves the image to the base
    negative: str = ""
    noise: str = ""  # another prompt whose noise to take


def initial_noise(seed, prompt_hash, index, shape):
    """The noise [h, w, C] float32 that an image starts from; prompt_hash is values.text_hash(prompt)."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt_hash), index)
    return jax.random.normal(key, shape)


@functools.partial(jax.jit, static_argnames=("graphs", "prediction_type", "shape"))
def _sample(graphs, params, batch, table, guidance_scale, scaling_factor, *, prediction_type, shape):
    """One batch of images [B, H, W, 3] uint8; `batch` as `generate` makes it."""
    text_encoder, unet, vae, value_encoder = (graph and nnx.merge(graph, part) for graph, part in zip(graphs, params))
    noise = jax.vmap(functools.partial(initial_noise, shape=shape))(batch["seed"], batch["prompt_hash"], batch["index"])

    cond = text_encoder(jnp.concatenate([batch["prompt_ids"], batch["negative_ids"]])).last_hidden_state
    mask = None
    if value_encoder:
        # [u; c] against [masked; c]: the negative prompt and images without a value see 77 tokens.
        u = value_encoder(batch["value_prompt_ids"]).pooled
        u = jnp.concatenate([u, jnp.zeros_like(u)])[:, None]
        cond = jnp.concatenate([u.astype(cond.dtype), cond], axis=1)
        mask = jnp.ones(cond.shape[:2], bool)
        mask = mask.at[:, 0].set(jnp.concatenate([batch["has_value"], jnp.zeros_like(batch["has_value"])]))

    def predict(z, t):
        both = unet(jnp.concatenate([z, z]), jnp.full(2 * len(z), t), cond, mask)
        with_prompt, with_negative = jnp.split(both.astype(jnp.float32), 2)
        return with_negative + guidance_scale * (with_prompt - with_negative)

    z = diffusion.sample(predict, noise, table, prediction_type)
    images = vae.decode(z / scaling_factor).astype(jnp.float32)
    return jnp.round(jnp.clip((images + 1) * 127.5, 0, 255)).astype(jnp.uint8)


def generate(
    sd,
    requests: list[Request],
    value_encoder=None,
    *,
    seed: int = 0,
    steps: int = 25,
    guidance_scale: float = 7.5,
    sampler: str = "dpmsolver++",
    batch_size: int = 8,
    mesh=None,
    description: str | None = None,
) -> np.ndarray:
    """Draws one image for each request.

    Args:
        sd: a StableDiffusion.
        value_encoder: a ValueEncoder; needed where a request has a value.
        steps, sampler: of the sampler, one of diffusion.SAMPLERS.
        guidance_scale: classifier-free guidance (Ho & Salimans 2022), against the negative prompt.
        batch_size: images at once, over the whole mesh. Images do not depend on it.
        mesh: the devices; all of them by default.
        description: of a progress bar; None for none.

    Returns:
        [N, H, W, 3] uint8, in the order of the requests.

    Raises:
        ValueError: no requests, a value without a value encoder, a batch size that the mesh does not
            divide, a bad sampler or step count.
    """
    from tqdm import tqdm

    if not requests:
        raise ValueError("no images are asked for")
    if value_encoder is None and (wanting := [r.value for r in requests if r.value]):
        raise ValueError(f"value {wanting[0]!r} is asked for without a value encoder")
    mesh = mesh or sharding.make_mesh()
    sharding.check_batch_size(mesh, batch_size, "batch_size")
    table = diffusion.sampler_table(sd.scheduler_config, sampler, steps)
    modules = (sd.text_encoder, sd.unet, sd.vae, value_encoder)
    graphs, params = zip(*(split(module) if module is not None else (None, None) for module in modules))
    params = jax.device_put(params, sharding.replicated(mesh))
    latent_size = sd.image_size // 2 ** (len(sd.vae.config.block_out_channels) - 1)
    shape = (latent_size, latent_size, sd.vae.config.latent_channels)

    padded = list(requests) + [requests[-1]] * (-len(requests) % batch_size)
    columns = {
        "seed": np.full(len(padded), seed, np.uint32),
        "prompt_hash": np.array([text_hash(r.noise or r.prompt) for r in padded], np.uint32),
        "index": np.array([r.index for r in padded], np.uint32),
        "prompt_ids": sd.tokenize([r.prompt for r in padded]),
        "negative_ids": sd.tokenize([r.negative for r in padded]),
    }
    if value_encoder is not None:
        columns["value_prompt_ids"] = sd.tokenize([value_prompt(r.value, r.prompt) for r in padded])
        columns["has_value"] = np.array([r.value is not None for r in padded])
    images = []
    progress = tqdm(range(0, len(padded), batch_size), desc=description, unit="batch", disable=description is None)
    for start in progress:
        batch = {name: column[start : start + batch_size] for name, column in columns.items()}
        batch = jax.device_put(batch, sharding.over_batch(mesh))
        out = _sample(
            graphs, params, batch, table, guidance_scale, sd.vae.config.scaling_factor,
            prediction_type=sd.schedule.prediction_type, shape=shape,
        )  # fmt: skip
        images.append(sharding.fetch(out))
    return np.concatenate(images)[: len(requests)]


def requests_of(prompts, values=None) -> list[Request]:
    """Requests for prompts; the n-th time a prompt occurs, it is its n-th image.

    Args:
        prompts: list of str.
        values: None, one statement for all, or a list of statements and Nones, one for each prompt.
    """
    if values is None or isinstance(values, str):
        values = [values] * len(prompts)
    if len(values) != len(prompts):
        raise ValueError(f"{len(values)} values for {len(prompts)} prompts")
    seen = Counter()
    requests = []
    for prompt, value in zip(prompts, values):
        requests.append(Request(prompt, seen[prompt], value))
        seen[prompt] += 1
    return requests


def write_pairs(directory, sd, value_encoder, prompts, statement: str | None, num_images: int, **settings):
    """Writes images of each prompt, the base's and the aligned one of the same noise side by side.

    Files are {prompt number}_{image number}.png in `directory`; each holds its settings as PNG text.
    """
    from PIL.PngImagePlugin import PngInfo

    from livo_jax.report import sheet

    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    requests = [Request(prompt, i) for prompt in prompts for i in range(num_images)]
    sides = [requests] + ([[r._replace(value=statement) for r in requests]] if statement else [])
    images = generate(sd, sum(sides, []), value_encoder, description="generate", **settings)
    for i, request in enumerate(requests):
        info = PngInfo()
        for name, setting in {**request._asdict(), "value": statement, **settings}.items():
            info.add_itxt(name, str(setting))
        name = f"{i // num_images:03d}_{request.index:03d}.png"
        sheet([images[i :: len(requests)]]).save(directory / name, pnginfo=info)
