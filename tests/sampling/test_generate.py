"""The sampler as users call it: the published pipeline's numbers, and images that depend on their request alone."""

import copy
import dataclasses
import functools
import itertools
import warnings
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from livo_jax import ValueEncoder, diffusion, seeds, sharding, values
from livo_jax.diffusion.samplers import GAMMA
from livo_jax.export.export import SCHEDULERS
from livo_jax.files.modules import initialise
from livo_jax.models.weights import split
from livo_jax.retrieval.retriever import Retriever
from livo_jax.sampling import generate, pairs
from livo_jax.sampling.requests import Dose, Request, requests_of
from livo_jax.values.dealing import applies
from livo_jax.values.principles import text_hash
from tests.sampling.conftest import DOSE, OTHER, SETTINGS, VALUE


def published_pipeline(sd, published, torch_models, scheduler, cls=None, **options):
    """diffusers' StableDiffusionPipeline of the same weights, or another class."""
    import diffusers
    from transformers import CLIPTokenizer

    return (cls or diffusers.StableDiffusionPipeline)(
        **torch_models, tokenizer=CLIPTokenizer.from_pretrained(published / "tokenizer"),
        scheduler=getattr(diffusers, scheduler).from_config(sd.scheduler_config, **options),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def feed_step_noise(monkeypatch, scheduler: str, seed: int, prompts, shape):
    """Has a scheduler of diffusers add the noise that we add to the first images of these prompts."""
    import diffusers

    step = itertools.count()

    def draw(*_, **__):
        i = next(step)
        noise = np.stack([generate.step_noise(seeds.key(seed), text_hash(prompt), 0, i, shape) for prompt in prompts])
        return torch.tensor(noise.transpose(0, 3, 1, 2))

    # Schedulers without noise have no such name, and need none.
    monkeypatch.setattr(f"{getattr(diffusers, scheduler).__module__}.randn_tensor", draw, raising=False)


@pytest.mark.parametrize("sampler", diffusion.SAMPLERS)
def test_images_are_the_published_pipelines(sd, published, torch_models, sampler, monkeypatch):
    """The whole way, tokens to pixels, against diffusers' StableDiffusionPipeline from the same noise."""
    scheduler, options = SCHEDULERS[sampler]
    feed_step_noise(monkeypatch, scheduler, 5, ["a photo of a baker", "a cook at work"], sd.latent_shape)
    pipeline = published_pipeline(sd, published, torch_models, scheduler, **options)
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a photo of a baker", "a cook at work"]
    noise = np.stack([generate.initial_noise(5, text_hash(p), 0, sd.latent_shape) for p in prompts])
    theirs = pipeline(
        prompts, num_inference_steps=6, guidance_scale=3.0, latents=torch.tensor(noise.transpose(0, 3, 1, 2)),
        output_type="np", eta=GAMMA if sampler == "tcd" else 0.0,
    ).images  # fmt: skip
    ours = sd.generate(prompts, seed=5, sampler=sampler, **SETTINGS | {"steps": 6, "batch_size": 2})
    assert ours.shape == (2, sd.image_size, sd.image_size, 3) and ours.dtype == np.uint8
    assert np.abs(ours - theirs * 255).max() < 1.0, "equal but for rounding to bytes"


def test_any_number_of_prompts_is_one_program_of_a_mesh(sd, monkeypatch):
    """And of two images a device, decoded one at a time, the images are the same."""
    prompts = ["a baker", "a cook"] * 9
    whole = sd.generate(prompts, **SETTINGS)
    compiled = generate._sample._cache_size()
    for n in (1, 8, 9):
        assert np.array_equal(sd.generate(prompts[:n], **SETTINGS), whole[:n])
    assert generate._sample._cache_size() == compiled
    monkeypatch.setattr(generate, "DECODED_PIXELS", sd.image_size**2)
    parts = sd.generate(prompts[:2], **SETTINGS | {"batch_size": 2})
    assert np.abs(parts.astype(int) - whole[:2]).max() <= 1


def test_few_prompts_are_few_images_and_weights_stay_where_they_lie(small, monkeypatch):
    """Of 8 devices each gets a copy of the weights once, and one prompt is drawn on one of them."""
    sd, *_ = small
    drawn = []

    def sample(graphs, params, batch, *args, shape, **kw):
        devices = {frozenset(x.sharding.device_set) for x in jax.tree.leaves(params)}
        drawn.append((batch.index.shape[0], *map(len, devices)))
        return jnp.zeros((drawn[-1][0], 1, 1, 3), np.uint8), jnp.ones(drawn[-1][0], bool)

    def pointers():
        return [shard.data.unsafe_buffer_pointer() for shard in sd.unet.conv_in.kernel[...].addressable_shards]

    monkeypatch.setattr(generate, "_sample", sample)
    for n in (1, 3, 8, 9, 40, 1):
        assert len(sd.generate(["a baker"] * n, batch_size=4)) == n
    assert drawn == [(1, 1), (3, 3), (8, 8), (16, 8), (32, 8), (32, 8), (1, 1)]
    copies = pointers()
    sd.generate(["a baker"] * 8)
    assert pointers() == copies and len(copies) == 8


def test_what_is_not_finite_is_no_image(small):
    """Neither is a black one: it would count as harmless."""
    sd, *_ = small
    request = Request("a baker", 3)
    settings = dict(steps=1, mesh=sharding.make_mesh(1), batch_size=1)
    generate.generate(sd, [request], **settings)
    with pytest.raises(
        FloatingPointError, match="'a baker', image 3: the weights are finite; they overflow with .*3e.38"
    ):
        generate.generate(sd, [request], guidance_scale=3e38, **settings)
    broken = copy.copy(sd)
    graph, params = split(sd.vae)
    broken.vae = nnx.merge(graph, params)
    broken.vae.decoder.conv_out.bias[...] *= np.nan
    with pytest.raises(
        FloatingPointError, match="1 images are not finite.*1 weights .*: AutoencoderKL: decoder.conv_out"
    ):
        generate.generate(broken, [request], **settings)


def test_the_official_layout(sd, published, torch_models, value_encoder):
    """Value token and the prompt's own n tokens, against n + 1 tokens of the negative prompt, as unpadded PyTorch."""
    text, tokenizer = torch_models["text_encoder"], sd.tokenizer

    def encode(t, **kw):
        return text(tokenizer(t, return_tensors="pt", **kw).input_ids)

    for prompt, negative in (("a photo of a baker", ""), ("a baker", "a picture of a cook at work on a bloody day")):
        n = len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            u = encode(f"{VALUE}, {prompt}").pooler_output
            policy = torch.cat([u[:, None], encode(prompt).last_hidden_state], dim=1)
            other = encode(negative, padding="max_length", max_length=n + 1, truncation=True).last_hidden_state
        assert policy.shape == other.shape
        pipeline = published_pipeline(sd, published, torch_models, "DDIMScheduler")
        pipeline.set_progress_bar_config(disable=True)
        noise = np.array(generate.initial_noise(0, text_hash(prompt), 0, sd.latent_shape))
        theirs = pipeline(
            prompt_embeds=policy, negative_prompt_embeds=other, num_inference_steps=4, guidance_scale=3.0,
            latents=torch.tensor(noise).permute(2, 0, 1)[None], output_type="np",
        ).images  # fmt: skip
        requests = [Request(prompt, 0, DOSE, negative), Request(prompt, 0, (), negative)]
        settings = SETTINGS | {"sampler": "ddim"}
        ours = generate.generate(sd, requests, value_encoder, **settings, prompt_layout="official")
        assert np.abs(ours[0] - theirs[0] * 255).max() < 1.0
        padded = generate.generate(sd, requests, value_encoder, **settings)
        assert np.abs(ours[0].astype(int) - padded[0]).max() > 1, "the layouts differ"
        assert np.abs(ours[1].astype(int) - padded[1]).max() <= 1, "but not without a value"


def test_an_image_depends_on_its_request_alone(sd, value_encoder):
    requests = [Request(p, i, v) for p in ("a baker", "a cook") for i in range(3) for v in ((), DOSE)]
    images = generate.generate(sd, requests, value_encoder, **SETTINGS)
    assert len({image.tobytes() for image in images}) == len(requests)
    others = (
        (slice(None, None, -1), {}),
        (slice(2, 7), {"batch_size": 2}),
        (slice(None), {"mesh": None}),  # all devices
    )
    for order, settings in others:
        again = generate.generate(sd, requests[order], value_encoder, **SETTINGS | settings)
        assert np.abs(images[order].astype(int) - again).max() <= 1
    other_seed = generate.generate(sd, requests[:2], value_encoder, seed=1, **SETTINGS)
    assert np.abs(images[:2].astype(int) - other_seed).max() > 1


def test_images_without_a_value_are_the_bases(sd, value_encoder):
    """The masked value token: 78 tokens give what 77 gave."""
    requests = [Request("a baker", i) for i in range(4)]
    base = generate.generate(sd, requests, **SETTINGS)
    mixed = generate.generate(sd, requests + [Request("a baker", 0, DOSE)], value_encoder, **SETTINGS)
    assert np.abs(base.astype(int) - mixed[:4]).max() <= 1
    assert np.abs(mixed[4].astype(int) - base[0]).max() > 1


def test_several_values_are_several_tokens(sd, value_encoder):
    """Their order does not matter, they are not one of them, and those of another image in the batch are not seen."""
    both, swapped, one, none = (
        Request("a baker", 0, tuple(map(Dose, names))) for names in ([VALUE, OTHER], [OTHER, VALUE], [VALUE], [])
    )
    images = generate.generate(sd, [both, swapped, one, none], value_encoder, **SETTINGS).astype(int)
    assert np.abs(images[0] - images[1]).max() <= 1 and np.abs(images[0] - images[2]).max() > 1
    for image, request in zip(images[2:], (one, none)):
        assert np.abs(image - generate.generate(sd, [request], value_encoder, **SETTINGS)).max() <= 1


def test_rematerialised_and_sharded_models_draw_the_same(sd):
    """Their blocks run in a trace of their own, within the sampler's loop."""
    mesh, requests, unet = sharding.make_mesh(2, 2, 2), [Request("a baker", i) for i in range(4)], sd.unet
    expected = generate.generate(sd, requests, **SETTINGS)
    graph, params = split(unet)
    sd.unet = nnx.merge(graph, jax.device_put(params, sharding.by_rules(params, mesh)))
    sd.unet.remat, sd.unet.gather = "full", functools.partial(sharding.gather, mesh=mesh)
    drawn = generate.generate(sd, requests, **SETTINGS | {"mesh": mesh})
    sd.unet = unet
    assert np.abs(drawn.astype(int) - expected).max() <= 1


def test_strength_is_a_dial_for_each_value(sd, value_encoder):
    """0 is the base, 1 LiVO, between them and past it the effect grows; beside another value too."""
    dials = (1e-6, 0.25, 0.5, 0.75, 1 - 1e-6, 1.5)
    dosed = [(Dose(VALUE, strength),) for strength in dials]
    beside = [(Dose(OTHER), Dose(VALUE, strength)) for strength in dials]
    whole = [(Dose(VALUE, 0.0),), (Dose(VALUE),), (Dose(OTHER),)]
    requests = [Request("a baker", 0, doses) for doses in dosed + beside + whole]
    images = list(generate.generate(sd, requests, value_encoder, **SETTINGS).astype(int))
    (both,) = generate.generate(sd, [Request("a baker", 0, (Dose(OTHER), Dose(VALUE)))], value_encoder, **SETTINGS)
    base, livo, other = images[12:]
    assert np.abs(base - generate.generate(sd, [Request("a baker")], **SETTINGS)[0]).max() <= 1
    for dial, start, end in ((images[:6], base, livo), (images[6:12], other, both)):
        assert np.abs(dial[0] - start).max() <= 1 and np.abs(dial[4] - end).max() <= 1
        distances = [np.abs(image - start).mean() for image in dial]
        assert distances == sorted(distances) and distances[1] > 0
    roomy = generate.generate(sd, requests[-4:], value_encoder, slots=(3, 2), **SETTINGS)
    assert np.abs(np.array(images[-4:]) - roomy).max() <= 1, "slots that no value takes"


def test_the_retriever_chooses_and_says_why(sd, value_encoder):
    retriever = Retriever(values.load(("shape", "bloody")))
    prompts = ["a bloody tailor", "a bloody tailor", "an orange", "a round baker"]
    images = sd.generate(prompts, "auto", value_encoder, retriever=retriever, **SETTINGS)
    bloody = "bloody considered inappropriate"
    statements = [[dose.value for dose in doses] for doses in images.applied]
    assert statements[2] == [] and statements[3] == []
    assert all(bloody in found for found in statements[:2])
    assert sum("shape equality" in found for found in statements[:2]) == 1, (
        "a share of the images, as the principle says"
    )
    assert "it says 'bloody'" in images.applied[0][0].reason
    base = sd.generate(prompts, None, **SETTINGS)
    assert np.abs(images[2:].astype(int) - base[2:]).max() <= 1 and np.abs(images[0].astype(int) - base[0]).max() > 1


def test_the_negative_prompt_and_the_noise_of_another(sd):
    requests = [
        Request("a baker"), Request("a baker", negative="a cook"), Request("a baker", noise="a cook"),
        Request("A BAKER"), Request("A BAKER", noise="a baker"),  # the same tokens
    ]  # fmt: skip
    plain, negative, borrowed, own, lent = generate.generate(sd, requests, **SETTINGS)
    assert np.abs(plain.astype(int) - negative).max() > 1
    assert np.abs(plain.astype(int) - borrowed).max() > 1
    assert np.abs(plain.astype(int) - own).max() > 1
    assert np.abs(plain.astype(int) - lent).max() <= 1


def test_a_request_may_have_its_own_seed_guidance_and_size(small):
    """They are those of a call of these; images of two sizes are of two calls."""
    sd, *_ = small
    side, settings = sd.image_size, SETTINGS | {"batch_size": 4, "seed": 1}

    def draw(*requests, **changes):
        return generate.generate(sd, list(requests), **settings | changes)

    wide = Request("a baker", size=(side, 2 * side))
    calls = [draw(wide), draw(wide, seed=7), draw(wide, guidance_scale=9.0)]
    own = draw(wide, wide._replace(seed=7), wide._replace(guidance_scale=9.0))
    assert own.shape == (3, side, 2 * side, 3) and len({image.tobytes() for image in own}) == 3
    assert all(np.abs(ours.astype(int) - theirs[0]).max() <= 1 for ours, theirs in zip(own, calls))
    with pytest.raises(ValueError, match="edges must be multiples of"):
        draw(wide._replace(size=(side, 0)))
    with pytest.raises(ValueError, match="of one size"):
        draw(wide, wide._replace(size=None))


def test_requests_number_the_images_of_a_prompt():
    assert requests_of(["a", "b", "a"], VALUE) == [
        Request("a", 0, DOSE),
        Request("b", 0, DOSE),
        Request("a", 1, DOSE),
    ]
    assert requests_of(["a", "b"], [None, VALUE]) == [Request("a"), Request("b", 0, DOSE)]
    assert requests_of("a baker", VALUE) == [Request("a baker", 0, DOSE)], "one prompt, not seven letters"
    several = requests_of(["a", "b"], [[VALUE, OTHER], None], strength={OTHER: 0.5})
    assert several == [Request("a", 0, (Dose(VALUE), Dose(OTHER, 0.5))), Request("b")]
    dealt = requests_of(["a"] * 20 + ["b"] * 20, VALUE, keep_probability=0.45, seed=1)
    (shape,) = values.load(("shape",))
    share = shape.keep_probability
    assert [r.values == DOSE for r in dealt] == [applies(VALUE, share, 1, r.prompt, r.index) for r in dealt]
    assert sum(r.values == DOSE for r in dealt) == 18
    with pytest.raises(ValueError, match="strength of 'shape equalty', which is no value of the call"):
        requests_of(["a"], VALUE, strength={"shape equalty": 0.5})
    with pytest.raises(ValueError, match="value 'shape equality' is there twice"):
        requests_of(["a"], [[VALUE, VALUE]])
    with pytest.raises(ValueError, match="3 values for 2 prompts"):
        requests_of(["a", "b"], [VALUE] * 3)
    with pytest.raises(ValueError, match="'auto' stands alone"):
        requests_of(["a", "b"], [["auto", VALUE], None])


RATES = {
    VALUE: {
        "": {"round": 0.5, "square": 0.5},
        VALUE: {"round": 0.5, "square": 0.5},
        f"{VALUE}: round": {"round": 1.0, "square": 0.0},
        f"{VALUE}: square": {"round": 0.0, "square": 1.0},
    },
    OTHER: {"": {"blue": 1.0, "green": 0.0}, OTHER: {"blue": 0.0, "green": 1.0}},
}


def counts(requests) -> Counter:
    return Counter(tuple(dose.value for dose in r.values) for r in requests)


def test_a_ratio_deals_out_tokens():
    """Over all images and each prompt's, in the place of the keep probability, with strengths as they are."""
    ratio = {"round": 0.7, "square": 0.3}
    requests = requests_of(["a", "b"] * 10, VALUE, keep_probability=0.1, ratio=ratio, rates=RATES, strength=0.5)
    for group, share in ((requests[::2], 10), (requests[1::2], 10), (requests, 20)):
        expected = {(f"{VALUE}: round",): round(0.7 * share), (f"{VALUE}: square",): round(0.3 * share)}
        assert counts(group) == expected
    assert {dose.strength for r in requests for dose in r.values} == {0.5} and requests[3].index == 1
    mixed = requests_of(["a"] * 10, [[VALUE, OTHER]] * 10, ratio={"round": 1.0}, rates=RATES)
    assert counts(mixed) == {(f"{VALUE}: round", OTHER): 10}, "a value that the ratio does not name goes on as before"
    retrieved = requests_of(
        ["a baker"] * 6 + ["an orange"], "auto", ratio="equal", rates=RATES,
        retriever=Retriever(values.load(("shape",))),
    )  # fmt: skip
    assert counts(retrieved) == {(f"{VALUE}: round",): 3, (f"{VALUE}: square",): 3, (): 1}


def test_a_ratio_that_cannot_be_is_told():
    with pytest.raises(ValueError, match="ratio='equal' needs rates.*eval/rates.json"):
        requests_of(["a"], VALUE, ratio="equal")
    with pytest.raises(
        ValueError, match="for none of the values \\['bloody considered inappropriate'\\], but for biases"
    ):
        requests_of(["a"], "bloody considered inappropriate", ratio="equal", rates=RATES)
    with pytest.raises(ValueError, match="'oval' is no attribute"):
        requests_of(["a"], VALUE, ratio={"oval": 1.0}, rates=RATES)


def test_images_tell_which_attribute_they_were_dealt(sd, value_encoder):
    images = sd.generate(["a baker"] * 2, VALUE, value_encoder, ratio="equal", rates=RATES, **SETTINGS)
    assert {doses[0].value for doses in images.applied} == {f"{VALUE}: round", f"{VALUE}: square"}
    for i, doses in enumerate(images.applied):
        (expected,) = generate.generate(sd, [Request("a baker", i, doses)], value_encoder, **SETTINGS)
        assert np.abs(images[i].astype(int) - expected).max() <= 1


def test_noise_is_normal_and_its_keys_differ():
    indices = np.arange(50, dtype=np.uint32)
    initial = jax.vmap(lambda i: generate.initial_noise(0, text_hash("a"), i, (8, 8, 4)))(indices)
    steps = [
        jax.vmap(lambda i: generate.step_noise(seeds.key(0), text_hash("a"), i, step, (8, 8, 4)))(indices)  # noqa: B023
        for step in range(3)
    ]
    noise = np.concatenate([initial, *steps])
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert len({n.tobytes() for n in noise}) == 200


@pytest.mark.parametrize("sampler", ["euler_ancestral", "lcm", "tcd"])
def test_noise_of_each_step_is_the_images_own(sd, value_encoder, sampler):
    """Whatever its place in the batch, its device, and the images beside it; without a value it is the base's."""
    settings = SETTINGS | {"sampler": sampler, "guidance_scale": 1.0}
    requests = [Request(p, i, v) for p in ("a baker", "a cook") for i in range(2) for v in ((), DOSE)]
    images = generate.generate(sd, requests, value_encoder, **settings)
    assert len({image.tobytes() for image in images}) == len(requests)
    for order, changes in (
        (slice(None, None, -1), {}),
        (slice(2, 7), {"batch_size": 2, "mesh": sharding.make_mesh(2)}),
    ):
        again = generate.generate(sd, requests[order], value_encoder, **settings | changes)
        assert np.abs(images[order].astype(int) - again).max() <= 1
    assert np.abs(images[0].astype(int) - generate.generate(sd, requests[:1], **settings)[0]).max() <= 1
    (own,) = generate.generate(sd, [requests[0]._replace(seed=1)], **settings)
    (same,) = generate.generate(sd, requests[:1], seed=1, **settings)
    np.testing.assert_array_equal(own, same)


def test_deterministic_samplers_draw_no_noise(sd):
    """Their program is what it was before there were others."""

    def draws(sampler):
        table, z = diffusion.sampler_table(sd.scheduler_config, sampler, 4), np.zeros((1, 2, 2, 4), np.float32)

        def run(key, z):
            def draw(step):
                return jax.random.normal(jax.random.fold_in(key, step), z.shape)

            return diffusion.sample(lambda z, t, _: (z, None), z, table, None, draw)

        return "random_bits" in str(jax.make_jaxpr(run)(jax.random.key(0), z))

    assert {sampler for sampler in diffusion.SAMPLERS if draws(sampler)} == {"euler_ancestral", "lcm", "tcd"}


def test_what_cannot_be_drawn_is_said(sd, value_encoder, tmp_path):
    with pytest.raises(ValueError, match="no images"):
        generate.generate(sd, [])
    with pytest.raises(ValueError, match="'shape equality' is asked for without a value encoder"):
        sd.generate(["a baker"], values=VALUE)
    with pytest.raises(ValueError, match="batch_size=0: choose at least 1"):
        sd.generate(["a baker"], batch_size=0)
    with pytest.raises(ValueError, match="euler-maruyama.*ddim"):
        sd.generate(["a baker"], sampler="euler-maruyama")
    with pytest.raises(ValueError, match="prompt_layout='odd': choose from padded, official"):
        sd.generate(["a baker"], prompt_layout="odd")
    with pytest.raises(ValueError, match=r"'a \\ud800 baker' is no Unicode text"):
        sd.generate(["a \ud800 baker"])
    with pytest.raises(ValueError, match="None is no text: prompts are a list of texts, or one"):
        sd.generate([None])
    for wrong in ({"steps": "2"}, {"steps": 2.0}, {"guidance_scale": "7.5"}, {"batch_size": None}):
        with pytest.raises(ValueError, match="=.*: choose a (whole )?number"):
            sd.generate("a baker", **wrong)
    assert np.array_equal(sd.tokenize("a baker"), sd.tokenize(["a baker"]))
    narrow = initialise(ValueEncoder, sd.root / "text_encoder")
    narrow.config = dataclasses.replace(narrow.config, hidden_size=24, vocab_size=7)
    with pytest.raises(ValueError, match="another model:(.|\n)*hidden_size: 24 in the value(.|\n)*vocab_size: 7 in"):
        sd.generate(["a baker"], values=VALUE, value_encoder=narrow)
    with pytest.raises(ValueError, match="odd"):
        pairs.write_pairs(
            tmp_path / "out", sd, None, ["a baker"], None, 1, seed=0, batch_size=8, options={}, sampler="odd"
        )
    assert not (tmp_path / "out").exists(), "nothing is left of what failed"


def test_odd_texts_are_drawn(sd, value_encoder):
    """Emoji, other scripts, control characters, nothing at all: every text has its image."""
    texts = ["", " ", "\U0001f9d1\u200d\U0001f373", "\u0645\u0631\u062d\u0628\u0627", "a\x00b\n\tc", "e\u0301"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bytes of which this vocabulary has no words pass 16 tokens
        images = sd.generate(texts, values=VALUE, value_encoder=value_encoder, **SETTINGS)
    assert images.shape == (6, sd.image_size, sd.image_size, 3) and len({image.tobytes() for image in images}) == 6
