"""The sampler as users call it: images of prompts, with and without value tokens."""

import functools
import math
import numbers
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from livo_jax import diffusion, seeds, sharding
from livo_jax.models.weights import apply, name_of, put, split
from livo_jax.sampling.conditioning import (
    Batch,
    condition,
    cut_to_official_layout,
    merge_rows,
    value_columns,
)
from livo_jax.sampling.guidance import ClassifierFree, Dosed, Guidance
from livo_jax.sampling.requests import Dose, Request
from livo_jax.value_encoders.base import check_value_encoder, strip_unread
from livo_jax.value_encoders.gates import find_gates, shut
from livo_jax.values.principles import text_hash

STEP_NOISE = 2**32 - 1  # folded into a seed's key for the noise of steps; no seed has it as its upper word
DECODED_PIXELS = 2**21  # at once on a device: 8 images of 512 px, for which the decoder takes some GB


def decoder_parts(batch_size: int, size: tuple[int, int]) -> int:
    """In how many parts, of as many images each, a device's batch of images of size (height, width) is decoded."""
    parts = min(-(-batch_size * math.prod(size) // DECODED_PIXELS), batch_size)
    return next(n for n in range(parts, batch_size + 1) if batch_size % n == 0)


def initial_noise(seed, prompt_hash, index, shape):
    """The noise [h, w, C] float32 that an image starts from; prompt_hash is values.text_hash(prompt)."""
    return _noise(seeds.key(seed), prompt_hash, index, shape)


def step_noise(key, prompt_hash, index, step, shape):
    """The noise [h, w, C] float32 that a sampler which draws noise adds at a step, 0 for the first.

    key: seeds.key of the image's seed.
    """
    return _noise(jax.random.fold_in(jax.random.fold_in(key, STEP_NOISE), step), prompt_hash, index, shape)


def _noise(key, prompt_hash, index, shape):
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, prompt_hash), index), shape)


@functools.partial(jax.jit, static_argnames=("graphs", "shape", "decoder_parts", "guidance"))
def _sample(
    graphs,
    params,
    batch: Batch,
    table,
    guidance_scale,
    time_ids,
    *,
    shape,
    decoder_parts: int,
    guidance: Guidance,
):
    """One batch of images [B, H, W, 3] uint8, and whether each is finite, [B] bool.

    time_ids: as StableDiffusion has them.
    """
    if batch.guidance_scales is not None:
        guidance_scale = batch.guidance_scales[:, None, None, None]
    text_encoder, _, vae, value_encoder = (graph and nnx.merge(graph, part) for graph, part in zip(graphs, params))
    keys = jax.vmap(seeds.key_of)(batch.seed_low, batch.seed_high)
    whose = keys, batch.prompt_hash, batch.index
    noise = jax.vmap(functools.partial(_noise, shape=shape))(*whose)
    given = condition(batch, text_encoder, value_encoder)

    def predict(z, told, carried):
        z_t, t = jnp.repeat(z, given.rows, axis=0), jnp.full(given.rows * len(z), told)
        eps = apply(graphs[1], params[1], z_t, t, given.cond, given.mask, given.text_embeds, time_ids)
        eps = eps.astype(jnp.float32)
        prompt, *others = jnp.unstack(eps.reshape(-1, given.rows, *z.shape[1:]), axis=1)
        negative = None if batch.negative_ids is None else others.pop(0)
        weights = batch.weights
        if batch.gates is not None:
            weights = shut(weights, prompt, others, batch.gates, told)
        return guidance(prompt, negative, others, weights, guidance_scale, carried)

    def draw_noise(step):
        return jax.vmap(functools.partial(step_noise, step=step, shape=shape))(*whose)

    z = diffusion.sample(predict, noise, table, guidance.start(noise), draw_noise)
    return decode(vae.config.unscale(z), vae, decoder_parts)


def decode(z, vae, parts: int):
    """Images [B, H, W, 3] uint8 of latents [B, h, w, C], and whether each is finite, [B] bool; in so many parts."""

    def decode_part(z):
        pixels = apply(*split(vae), z, method="decode").astype(jnp.float32)
        finite = jnp.isfinite(z).all((1, 2, 3)) & jnp.isfinite(pixels).all((1, 2, 3))
        return jnp.round(jnp.clip((pixels + 1) * 127.5, 0, 255)).astype(jnp.uint8), finite

    # Each part has every parts-th row: each device's rows stay its own.
    split_z = z.reshape(-1, parts, *z.shape[1:]).swapaxes(0, 1)
    return jax.tree.map(lambda x: merge_rows(x.swapaxes(0, 1)), jax.lax.map(decode_part, split_z))


def generate(
    sd,
    requests: list[Request],
    value_encoder=None,
    *,
    seed: int = 0,
    steps: int = 25,
    guidance_scale: float = 7.5,
    sampler: str | None = None,
    prompt_layout: str = "padded",
    batch_size: int = 8,
    mesh=None,
    slots: tuple[int, int] = (0, 0),
    guidance=None,
    gated: bool = False,
    description: str | None = None,
) -> np.ndarray:
    """Draws one image for each request.

    Args:
        sd: a StableDiffusion.
        value_encoder: one of livo_jax.value_encoders; needed where a request has values. A strength that is neither 0
            nor 1 costs one UNet evaluation more.
        steps, sampler: of the sampler, one of diffusion.SAMPLERS, of Stable Diffusion 3 of FLOW_SAMPLERS. None is
            dpmsolver++, and there euler.
        guidance_scale: classifier-free guidance (Ho & Salimans 2022), against the negative prompt. At most 1 is no
            guidance: the prediction for the prompt alone, for half the UNet evaluations unless another request of the
            call is guided. Negative prompts then have no say.
        prompt_layout: what an image with a value is conditioned on. "padded": the value token and the
            padded prompt, as in training. "official": as the authors of LiVO sample, the value token
            and the n tokens of the prompt alone, against n + 1 tokens of the negative prompt.
        batch_size: images at once on each device of the mesh. Images depend on neither, but for rounding.
        mesh: the devices, to which weights are copied that do not lie on it. By default those that divide the weights,
            or else all, where the models keep a copy; of them few images take as few, and smaller batches.
        slots: room for so many values of full strength and of another, though no image has them: calls of equal
            slots share one compiled program.
        guidance: a Guidance of requests with edits, all with as many and without values. Requests without edits have
            classifier-free guidance, dosed where a value's strength asks for it.
        gated: whether a value takes effect only where it moves the prediction as far as on what it is for (the value
            encoder's `gates`), so that other images stay the base's own. It costs one UNet evaluation more a value.
        description: of a progress bar; None for none.

    Returns:
        [N, H, W, 3] uint8, in the order of the requests.

    Raises:
        ValueError: no requests, requests of several sizes or of one that the model cannot draw, a value without a
            value encoder or with one of another model, a text that is no Unicode, a bad batch size, layout, sampler,
            step count or seed, a guidance scale that is not finite, or of at most 1 where a guidance edits.
        FloatingPointError: an image is not finite; which, and the weights or settings that are why.
    """
    from tqdm import tqdm

    if not requests:
        raise ValueError("no images are asked for")
    if value_encoder is None and (wanting := [r.values for r in requests if r.values]):
        raise ValueError(f"value {wanting[0][0].value!r} is asked for without a value encoder")
    if value_encoder is not None:
        check_value_encoder(sd, value_encoder, {dose.value for r in requests for dose in r.values})
        value_encoder = value_encoder if any(r.values for r in requests) else None
    if len({len(r.edits) for r in requests}) > 1 or bool(guidance) != bool(requests[0].edits):
        raise ValueError("edits are for a guidance, as many in each request")
    if guidance and value_encoder is not None:
        raise ValueError("a guidance draws requests without values")
    if prompt_layout not in sd.family.LAYOUTS:
        raise ValueError(f"prompt_layout={prompt_layout!r}: choose from {', '.join(sd.family.LAYOUTS)}")
    gates = None
    if gated and value_encoder is not None:
        gates = find_gates(value_encoder, {dose.value for r in requests for dose in r.values}, prompt_layout)
    sampler = sampler or sd.family.SAMPLER
    if len({r.size for r in requests}) > 1:
        raise ValueError("images of one call are of one size")
    for text in {t for r in requests for t in _texts(r)}:
        if not isinstance(text, str):
            raise ValueError(f"{text!r} is no text: prompts are a list of texts, or one")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{ascii(text)} is no Unicode text: {error.reason} at {error.start}") from error
    for name, x in {"steps": steps, "batch_size": batch_size}.items():
        if not isinstance(x, numbers.Integral):
            raise ValueError(f"{name}={x!r}: choose a whole number")
    if not isinstance(guidance_scale, numbers.Real):
        raise ValueError(f"guidance_scale={guidance_scale!r}: choose a number")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: choose at least 1")
    guided = check_guidance(sd, requests, guidance_scale, guidance)
    modules = (sd.text_encoder, sd.unet, sd.vae, value_encoder)
    if mesh is None:
        home = sharding.home_of(sd.unet)
        for module in filter(None, modules):
            sharding.settle(module, home)
        mesh = sharding.part_of(home, len(requests))
        of_device = -(-len(requests) // sharding.batch_parts(mesh))
        batch_size = min(batch_size, 1 << (of_device - 1).bit_length())  # by powers of two: few programs
    table = diffusion.sampler_table(sd.scheduler_config, sampler, steps)
    modules = (*modules[:-1], value_encoder and strip_unread(value_encoder))
    graphs, params = zip(*(split(module) if module else (None, None) for module in modules))
    params = sharding.on_mesh(params, mesh)
    at_once = batch_size * sharding.batch_parts(mesh)
    padded = list(requests) + [requests[-1]] * (-len(requests) % at_once)
    own_seeds = [seeds.words(seeds.check(seed if r.seed is None else r.seed)) for r in padded]
    columns = Batch(
        seed_low=np.array([low for low, _ in own_seeds], np.uint32),
        seed_high=np.array([high for _, high in own_seeds], np.uint32),
        prompt_hash=np.array([text_hash(r.noise or r.prompt) for r in padded], np.uint32),
        index=np.array([r.index for r in padded], np.uint32),
        prompt_ids=sd.tokenize([r.prompt for r in padded]),
        negative_ids=sd.tokenize([r.negative for r in padded]) if guided else None,
        weights=np.array([[weight for _, weight in r.edits] for r in padded], np.float32),
    )
    if sd.zeros_for_empty_prompt and guided:
        columns.zeros = np.array([[False, not r.negative] + [False] * len(r.edits) for r in padded])
    if value_encoder is not None:
        rows = value_columns(sd, padded, slots, value_encoder.text, guided, gates)
        columns.values, columns.weights, columns.gates = rows
        if prompt_layout == "official":
            cut_to_official_layout(columns, sd.tokenizer)
    if guidance:
        ids = sd.tokenize([text for r in padded for text, _ in r.edits])
        columns.edit_ids = ids.reshape(len(padded), -1, *ids.shape[1:])
    else:
        guidance = Dosed() if columns.weights.shape[1] else ClassifierFree()
    if any(r.guidance_scale is not None for r in requests):
        columns.guidance_scales = np.array([scale_of(r, guidance_scale) for r in padded], np.float32)
    shape, time_ids = sd.shape_of(requests[0].size)
    parts = decoder_parts(batch_size, requests[0].size or (sd.image_size, sd.image_size))
    static, images = {"shape": shape, "decoder_parts": parts, "guidance": guidance}, []
    over_devices = functools.partial(put, sharding=sharding.over_batch(mesh))
    progress = tqdm(range(0, len(padded), at_once), desc=description, unit="batch", disable=description is None)
    for start in progress:
        batch = jax.tree.map(over_devices, columns.take_rows(start, start + at_once))
        with jax.set_mesh(mesh):  # which the attention kernels ask for
            drawn = _sample(graphs, params, batch, table, guidance_scale, time_ids, **static)
        drawn, finite = map(sharding.fetch, drawn)
        if not finite.all():
            spoilt = [request for request, good in zip(padded[start : start + at_once], finite) if not good]
            settings = dict(steps=steps, guidance_scale=guidance_scale, sampler=sampler)
            raise FloatingPointError(why_not_finite([*dict.fromkeys(spoilt)], modules, settings))
        images.append(drawn)
    return np.concatenate(images)[: len(requests)]


def settings_of_base(sampling) -> dict:
    """The fields of config.sampling on which an image without a value depends."""
    return {name: x for name, x in sampling.items() if name not in ("batch_size", "gated")}


def scale_of(request: Request, guidance_scale: float) -> float:
    """Its own guidance scale, or that of the call."""
    return guidance_scale if request.guidance_scale is None else request.guidance_scale


def check_guidance(sd, requests: list[Request], guidance_scale: float, guidance) -> bool:
    """Whether any image is guided. Warns of a model that is made for none, and of what has no say without it.

    Raises:
        ValueError: a scale that is not finite, or of at most 1 where a guidance edits.
    """
    scales = {scale_of(r, guidance_scale) for r in requests}
    if bad := sorted(str(scale) for scale in scales if not math.isfinite(scale)):
        raise ValueError(f"guidance_scale={', '.join(bad)}: choose a finite number; at most 1 is no guidance")
    unguided = [r for r in requests if scale_of(r, guidance_scale) <= 1]
    if guidance and unguided:
        raise ValueError(
            f"guidance_scale={scale_of(unguided[0], guidance_scale)} of prompt {unguided[0].prompt!r}:"
            f" {type(guidance).__name__} edits a guided prediction, and at most 1 is no guidance: choose above 1"
        )
    if idle := next((r.negative for r in unguided if r.negative), None):
        told = f"negative prompt {idle!r}: without guidance it has no say; choose guidance_scale above 1"
        warnings.warn(told, stacklevel=3)
    if sd.guidance_distilled and max(scales) > 1:
        told = f"guidance_scale={max(scales)}: {sd.name} is made for no guidance; choose at most 1"
        warnings.warn(told, stacklevel=3)
    return max(scales) > 1


def why_not_finite(requests: list[Request], modules, settings: dict) -> str:
    """Says which images are not finite, and whether the weights are why, or what they were drawn with."""
    arrays = {
        f"{type(module).__name__}: {name_of(path)}": x
        for module in filter(None, modules)
        for path, x in jax.tree.leaves_with_path(split(module)[1])
    }
    weights = [name for name, x in arrays.items() if not jnp.isfinite(x).all()]
    computed_in = {str(x.dtype) for x in arrays.values() if x.dtype.itemsize > 1}  # of 8 bits weights are kept alone
    settings["dtypes"] = sorted(computed_in)
    settings["strengths"] = sorted({dose.strength for request in requests for dose in request.values})
    if weights:
        why = f"{len(weights)} weights are not finite, fetch or train them anew: {', '.join(weights[:5])}"
    else:
        why = f"the weights are finite; they overflow with {settings}: choose a wider dtype or gentler settings"
    one = requests[0]
    return f"{len(requests)} images are not finite, as that of prompt {one.prompt!r}, image {one.index}: {why}"


def _texts(request: Request) -> list[str]:
    doses, edits = (dose.value for dose in request.values), (text for text, _ in request.edits)
    return [request.prompt, request.negative, request.noise, *doses, *edits]


class Images(np.ndarray):
    """[N, H, W, 3] uint8; `applied` has for each image the Doses of the values applied to it."""

    applied: list[tuple[Dose, ...]]
