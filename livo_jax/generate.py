"""The sampler as users call it: images of prompts, with and without the value token."""

import functools
import itertools
import pathlib
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from livo_jax import diffusion, sharding
from livo_jax.models.weights import put, split
from livo_jax.values import Value, applies, text_hash, value_prompt

PROMPT_LAYOUTS = ("padded", "official")


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


@functools.partial(jax.jit, static_argnames=("graphs", "shape"))
def _sample(graphs, params, batch, table, guidance_scale, scaling_factor, *, shape):
    """One batch of images [B, H, W, 3] uint8; `batch` as `generate` makes it."""
    text_encoder, unet, vae, value_encoder = (graph and nnx.merge(graph, part) for graph, part in zip(graphs, params))
    noise = jax.vmap(functools.partial(initial_noise, shape=shape))(batch["seed"], batch["prompt_hash"], batch["index"])

    # Each image's prompt and negative prompt lie side by side in the batch, so that no row leaves its device.
    pairs = lambda x, y: jnp.stack([x, y], axis=1).reshape(-1, *x.shape[1:])
    cond = text_encoder(pairs(batch["prompt_ids"], batch["negative_ids"])).last_hidden_state
    mask = None
    if value_encoder:
        # [u; c] against [masked; c]: the negative prompt and images without a value do not see the first token.
        u = value_encoder(batch["value_prompt_ids"]).pooled
        u = pairs(u, jnp.zeros_like(u))[:, None]
        length = pairs(batch["prompt_length"], batch["negative_length"])
        mask = jnp.arange(cond.shape[1]) < length[:, None]
        has_value = pairs(batch["has_value"], jnp.zeros_like(batch["has_value"]))
        cond = jnp.concatenate([u.astype(cond.dtype), cond], axis=1)
        mask = jnp.concatenate([has_value[:, None], mask], axis=1)

    def predict(z, t):
        both = unet(pairs(z, z), jnp.full(2 * len(z), t), cond, mask).astype(jnp.float32)
        with_prompt, with_negative = jnp.unstack(both.reshape(-1, 2, *z.shape[1:]), axis=1)
        return with_negative + guidance_scale * (with_prompt - with_negative)

    z = diffusion.sample(predict, noise, table)
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
    prompt_layout: str = "padded",
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
        prompt_layout: what an image with a value is conditioned on. "padded": the value token and the
            padded prompt, as in training. "official": as the authors of LiVO sample, the value token
            and the n tokens of the prompt alone, against n + 1 tokens of the negative prompt.
        batch_size: images at once on each device of the mesh. Images depend on neither, but for rounding.
        mesh: the devices; all of them by default. Weights that lie on it stay as they are, others are
            copied to each.
        description: of a progress bar; None for none.

    Returns:
        [N, H, W, 3] uint8, in the order of the requests.

    Raises:
        ValueError: no requests, a value without a value encoder or with one of another model, a text
            that is no Unicode, a bad batch size, layout, sampler or step count.
    """
    from tqdm import tqdm

    if not requests:
        raise ValueError("no images are asked for")
    if value_encoder is None and (wanting := [r.value for r in requests if r.value]):
        raise ValueError(f"value {wanting[0]!r} is asked for without a value encoder")
    if value_encoder is not None:
        check_value_encoder(sd, value_encoder)
    if prompt_layout not in PROMPT_LAYOUTS:
        raise ValueError(f"prompt_layout={prompt_layout!r}: choose from {', '.join(PROMPT_LAYOUTS)}")
    for text in {text for r in requests for text in (r.prompt, r.value or "", r.negative, r.noise)}:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{ascii(text)} is no Unicode text: {error.reason} at {error.start}") from error
    mesh = mesh or sharding.make_mesh()
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: choose at least 1")
    table = diffusion.sampler_table(sd.scheduler_config, sampler, steps)
    modules = (sd.text_encoder, sd.unet, sd.vae, value_encoder)
    graphs, params = zip(*(split(module) if module is not None else (None, None) for module in modules))
    whole = sharding.replicated(mesh)
    on_mesh = lambda x: getattr(x.sharding, "mesh", None) == mesh
    params = jax.tree.map(lambda x: x if on_mesh(x) else jax.device_put(x, whole), params)

    at_once = batch_size * sharding.batch_parts(mesh)
    padded = list(requests) + [requests[-1]] * (-len(requests) % at_once)
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
        columns["prompt_length"], columns["negative_length"] = np.full((2, len(padded)), columns["prompt_ids"].shape[1])
        if prompt_layout == "official":
            official_layout(columns, sd.tokenizer)
    images = []
    progress = tqdm(range(0, len(padded), at_once), desc=description, unit="batch", disable=description is None)
    for start in progress:
        batch = {name: column[start : start + at_once] for name, column in columns.items()}
        batch = {name: put(rows, sharding.over_batch(mesh)) for name, rows in batch.items()}
        out = _sample(graphs, params, batch, table, guidance_scale, sd.vae.config.scaling_factor, shape=sd.latent_shape)
        images.append(sharding.fetch(out))
    return np.concatenate(images)[: len(requests)]


def official_layout(columns: dict, tokenizer):
    """Cuts what images with a value are conditioned on to n tokens of the prompt, n + 1 of the negative prompt.

    A causal text encoder gives a token the same state whatever follows it: hiding is as good as cutting.
    """
    length = lambda ids: (ids == tokenizer.eos_token_id).argmax(1) + 1
    with_value, n = columns["has_value"], length(columns["prompt_ids"])
    columns["prompt_length"] = np.where(with_value, n, columns["prompt_length"])
    columns["negative_length"] = np.where(with_value, n + 1, columns["negative_length"])
    negative = columns["negative_ids"]
    cut = with_value & (length(negative) > n + 1)
    negative[cut, n[cut]] = tokenizer.eos_token_id  # a negative prompt that is longer ends there


def check_value_encoder(sd, value_encoder):
    """Raises ValueError unless the value encoder reads this model's tokens and makes one of its width."""
    differences = [
        f"{name}: {theirs} in the value encoder, {ours} in the text encoder of the model"
        for name in ("hidden_size", "vocab_size", "max_position_embeddings")
        if (theirs := getattr(value_encoder.config, name)) != (ours := getattr(sd.text_encoder.config, name))
    ]
    if differences:
        raise ValueError("the value encoder was made for another model:\n  " + "\n  ".join(differences))


def requests_of(prompts, values=None, keep_probability: float = 1.0, seed: int = 0) -> list[Request]:
    """Requests for prompts; the n-th time a prompt occurs, it is its n-th image.

    Args:
        prompts: list of str.
        values: None, one statement for all, or a list of statements and Nones, one for each prompt.
        keep_probability: the share of each prompt's images that its value is applied to; `seed`
            decides which they are (values.applies).
    """
    if values is None or isinstance(values, str):
        values = [values] * len(prompts)
    if len(values) != len(prompts):
        raise ValueError(f"{len(values)} values for {len(prompts)} prompts")
    seen = Counter()
    requests = []
    for prompt, value in zip(prompts, values):
        kept = value and applies(value, keep_probability, seed, prompt, seen[prompt])
        requests.append(Request(prompt, seen[prompt], value if kept else None))
        seen[prompt] += 1
    return requests


def with_value(requests: list[Request], value: Value, seed: int) -> list[Request]:
    """The requests, with the value in those that it is applied to: its keep_probability's share."""
    return [r._replace(value=value.statement) if value.applies(seed, r.prompt, r.index) else r for r in requests]


def write_pairs(
    directory,
    sd,
    value_encoder,
    prompts,
    value: Value | None,
    num_images: int,
    *,
    seed: int,
    batch_size: int,
    mesh=None,
    **settings,
):
    """Writes images of each prompt, the base's and the aligned one of the same noise side by side.

    Files are {prompt number}_{image number}.png in `directory`, each written when it is drawn, with its
    settings as PNG text.

    Args:
        value: applied to its keep_probability's share of the images; None for the base's images alone.
        settings: of generate.
    """
    from PIL.PngImagePlugin import PngInfo
    from tqdm import tqdm

    from livo_jax.report import sheet

    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)

    def numbered():
        seen = Counter()  # a prompt that recurs goes on counting
        for p, prompt in enumerate(prompts):
            for i in range(num_images):
                yield p, i, Request(prompt, seen[prompt])
                seen[prompt] += 1

    rows, mesh = numbered(), mesh or sharding.make_mesh()
    at_once = batch_size * sharding.batch_parts(mesh) // (2 if value else 1) or 1
    with tqdm(total=len(prompts) * num_images, desc="generate", unit="image") as progress:
        while chunk := list(itertools.islice(rows, at_once)):
            base = [request for *_, request in chunk]
            sides = [base, with_value(base, value, seed)] if value else [base]
            images = generate(
                sd, sum(sides, []), value_encoder, seed=seed, batch_size=batch_size, mesh=mesh, **settings
            )
            for k, (p, i, _) in enumerate(chunk):
                info = PngInfo()
                text = {**sides[-1][k]._asdict(), "seed": seed, **settings}
                for name, setting in text.items():
                    info.add_itxt(name, str(setting))
                picture = sheet([images[k :: len(chunk)]])
                picture.save(directory / f"{p:03d}_{i:03d}.png", pnginfo=info)
            progress.update(len(chunk))
