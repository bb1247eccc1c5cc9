"""The pipeline of an export draws what JAX draws, image for image in diffusers, and tells what it cannot."""

import copy
import functools
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from livo_jax import StableDiffusion, ValueEncoder, sharding
from livo_jax.export.export import export
from livo_jax.retrieval.retriever import Retriever
from livo_jax.sampling import generate
from livo_jax.values.principles import load, text_hash
from tests.export.conftest import BLOODY, RATES, VALUE
from tests.files.test_loras import LINEAR, fused, kohya, matrices
from tests.sampling.test_generate import feed_step_noise


@pytest.mark.parametrize(
    "sampler, name, changes, expected",
    [
        ("ddim", "DDIMScheduler", {}, dict(clip_sample=False, steps_offset=1)),
        (
            "ddim", "DDIMScheduler", dict(clip_sample=True, thresholding=True),
            dict(clip_sample=False, thresholding=False),
        ),
        (
            "dpmsolver++", "DEISMultistepScheduler", dict(algorithm_type="deis", solver_type="logrho", solver_order=3),
            dict(algorithm_type="dpmsolver++", solver_type="midpoint", solver_order=2, steps_offset=1),
        ),
    ],
    ids=["old file", "file for pixels", "another solver"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # the corrections, theirs and ours
def test_the_pipeline_takes_the_scheduler_that_we_draw_with(
    sampler, name, changes, expected, published, value_encoder, config, tmp_path
):
    from diffusers import DiffusionPipeline

    base = shutil.copytree(published, tmp_path / "base")
    for file, change in (
        (base / "scheduler" / "scheduler_config.json", changes | {"_class_name": name}),
        (base / "model_index.json", {"scheduler": ["diffusers", name]}),
    ):
        content = json.loads(file.read_text()) | change
        dropped = {"clip_sample", "steps_offset"} - change.keys()
        file.write_text(json.dumps({field: value for field, value in content.items() if field not in dropped}))
    config = config.copy_and_resolve_references()
    config.sampling.sampler = sampler
    export(tmp_path / "out", StableDiffusion.from_pretrained(base), value_encoder, config)
    pipeline = DiffusionPipeline.from_pretrained(
        base,
        custom_pipeline=str(tmp_path / "out"),
        value_encoder=tmp_path / "out",
        trust_remote_code=True,
        safety_checker=None,
    )
    assert dict(pipeline.scheduler.config) | expected == dict(pipeline.scheduler.config)


PROMPTS = ["a photo of a baker", "a bloody cook", "a photo of the sea"]
RETRIEVER = Retriever(load(("shape", "colour", "bloody")))


def noise(prompts, images: int) -> torch.Tensor:
    """What JAX draws from for seed 7, as `latents`."""
    rows = [generate.initial_noise(7, text_hash(p), i, (8, 8, 4)) for p in prompts for i in range(images)]
    return torch.tensor(np.stack(rows)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "options",
    [
        dict(keep_probability=0.5, guidance_scale=3.0), dict(ratio={"round": 0.4, "square": 0.6}, guidance_scale=3.0),
        dict(keep_probability=0.5, guidance_scale=0.5),
    ],
    ids=str,
)  # fmt: skip
def test_the_pipeline_draws_the_same_images(options, sd, value_encoder, pipeline):
    """As JAX from the same noise, values of several strengths on a share of the images; and says the same of them."""
    n, values = 3, [[VALUE, BLOODY], "auto", None]
    settings = dict(strength={VALUE: 0.5}, seed=7, guidance_scale=options["guidance_scale"])
    options = {name: x for name, x in options.items() if name not in settings}
    in_torch = dict(num_images_per_prompt=n, latents=noise(PROMPTS, n), output_type="np", **settings)
    theirs, base = pipeline(PROMPTS, values, **options, **in_torch), pipeline(PROMPTS, **in_torch)
    prompts, entries = zip(*(row for row in zip(PROMPTS, values) for _ in range(n)))
    ours = sd.generate(
        list(prompts), list(entries), value_encoder, retriever=RETRIEVER, rates=RATES, steps=4, batch_size=3,
        mesh=sharding.make_mesh(1), **settings, **options,
    )  # fmt: skip
    assert np.abs(ours - theirs.images * 255).max() < 1.0
    assert theirs.applied == ours.applied
    assert len({len(doses) for doses in ours.applied}) >= 3
    differ = [bool(np.abs(a - b).max() > 1 / 255) for a, b in zip(theirs.images, base.images)]
    assert differ == [bool(doses) for doses in ours.applied]


def test_gated_values_are_drawn_the_same(sd, value_encoder, pipeline, exported):
    """One that is open at first, beside one that always is; the export brings the gates, in JAX too."""
    loaded = ValueEncoder.from_pretrained(exported)
    assert loaded.gates == value_encoder.gates
    prompts, values = PROMPTS[:2], [[BLOODY, VALUE], BLOODY]
    settings = dict(strength={VALUE: 0.5}, seed=7, guidance_scale=3.0, gated=True)
    theirs = pipeline(prompts, values, latents=noise(prompts, 1), output_type="np", **settings).images * 255
    drawn = dict(steps=4, batch_size=2, mesh=sharding.make_mesh(1))
    assert np.abs(sd.generate(prompts, values, loaded, **drawn, **settings) - theirs).max() < 1.0
    settings["gated"] = False
    assert np.abs(sd.generate(prompts, values, loaded, **drawn, **settings) - theirs).max((1, 2, 3)).min() > 1
    with pytest.raises(ValueError, match="gated=True: the value encoder has no gate for smiling: export a run"):
        pipeline(prompts, "smiling", gated=True)


@pytest.mark.parametrize("sampler", ["lcm", "tcd"])
def test_noise_of_each_step(sampler, sd, value_encoder, config, published, tmp_path, monkeypatch):
    """An export of a few-step sampler draws what JAX draws, fed the noise that JAX adds."""
    from diffusers import DiffusionPipeline

    config = config.copy_and_resolve_references()
    config.sampling.update(sampler=sampler, guidance_scale=1.0)
    monkeypatch.setitem(sd.scheduler_config, "eta", 0.5)
    export(tmp_path / "out", sd, value_encoder, config)
    pipeline = DiffusionPipeline.from_pretrained(
        published, custom_pipeline=str(tmp_path / "out"), trust_remote_code=True, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    feed_step_noise(monkeypatch, type(pipeline.scheduler).__name__, 7, PROMPTS[:2], sd.latent_shape)
    theirs = pipeline(PROMPTS[:2], VALUE, strength=0.5, seed=7, latents=noise(PROMPTS[:2], 1), output_type="np").images
    ours = sd.generate(
        PROMPTS[:2], VALUE, value_encoder, strength=0.5, seed=7, steps=4, guidance_scale=1.0, sampler=sampler,
        batch_size=2, mesh=sharding.make_mesh(1),
    )  # fmt: skip
    assert np.abs(ours - theirs * 255).max() < 1.0


def test_a_base_with_a_lora(value_encoder, config, published, torch_models, tmp_path):
    """The pipeline takes it as diffusers' do, and draws what JAX draws with it."""
    from diffusers import DiffusionPipeline

    file, sd = tmp_path / "style.safetensors", StableDiffusion.from_pretrained(published)
    save_file(kohya({"unet": matrices(torch_models["unet"], LINEAR, np.random.default_rng(0))}), file)
    config = config.copy_and_resolve_references()
    config.loras = (f"{file}=0.5",)
    settings = dict(seed=7, steps=4, guidance_scale=3.0, mesh=sharding.make_mesh(1), batch_size=1)
    plain = sd.generate(PROMPTS[:1], VALUE, value_encoder, **settings)
    sd.merge_loras(config.loras)
    export(tmp_path / "out", sd, value_encoder, config)
    pipeline = DiffusionPipeline.from_pretrained(
        published, custom_pipeline=str(tmp_path / "out"), trust_remote_code=True, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = fused(pipeline, file, 0.5)(PROMPTS[0], VALUE, seed=7, latents=noise(PROMPTS[:1], 1), output_type="np")
    ours = sd.generate(PROMPTS[:1], VALUE, value_encoder, **settings)
    assert np.abs(ours - theirs.images * 255).max() < 1.0
    assert np.abs(ours.astype(int) - plain).max() > 1


def test_a_value_has_a_name_a_strength_and_a_reason(pipeline):
    """Few steps tell: strength 0 is the base, a name is its statement, and one prompt may have several values."""
    settings = dict(latents=noise(PROMPTS[:1], 1), num_inference_steps=1, output_type="np")
    draw = functools.partial(pipeline, PROMPTS[0], **settings)
    base, full = draw(), draw(VALUE)
    assert base.applied == [()] and full.applied == [((VALUE, 1.0, ""),)]
    np.testing.assert_array_equal(draw(VALUE, strength=0).images, base.images)
    np.testing.assert_array_equal(draw("shape", strength={"shape": 1}).images, full.images)
    assert not np.array_equal(base.images, full.images)
    both = draw(["bloody", VALUE], strength={"bloody": 2})
    assert both.applied == [((BLOODY, 2.0, ""), (VALUE, 1.0, ""))]
    auto = draw("auto", keep_probability=1.0).applied[0]
    assert [dose.value for dose in auto] == [VALUE, "colour equality"]
    assert {dose.reason for dose in auto} == {"keywords: it says 'baker'"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_draws_nearly_the_same(dtype, pipeline):
    """Also where the parts come in different dtypes: transformers keeps that of a file."""
    settings = dict(strength={VALUE: 0.5}, latents=noise(PROMPTS[:1], 1), output_type="np")
    whole = pipeline(PROMPTS[0], [VALUE, BLOODY], **settings).images
    half = copy.deepcopy(pipeline.components)
    for name in ("unet", "vae", "text_encoder"):
        half[name].to(dtype)
    half = type(pipeline)(**half, requires_safety_checker=False)
    half.set_progress_bar_config(disable=True)
    assert np.abs(half(PROMPTS[0], [VALUE, BLOODY], **settings).images - whole).mean() < 0.02


@pytest.mark.parametrize(
    "options, problem",
    [
        (dict(values=[VALUE]), "1 values for 2 prompts: give one for all"),
        (dict(values=[["auto", VALUE], None]), "'auto' stands alone"),
        (dict(values=[3, ""]), "value 3 is no text; value '' is no text"),
        (dict(values=VALUE, ratio={"oval": 1}), "'oval' is no attribute of shape equality"),
        (dict(values=VALUE, strength={VALUE: "much"}), "strength='much' of shape equality is no number"),
        (dict(values=VALUE, strength=float("nan"), keep_probability=2), "strength=nan .*; keep_probability=2 is not 0"),
        (dict(values=VALUE, strength={"shape equalty": 0.5}), "strength of 'shape equalty', which is no value of the"),
        (dict(values=[["shape", VALUE], None]), "value 'shape equality' is there twice: a strength doses it"),
        (dict(negative_prompt=["blue"]), "1 negative prompts for 2 prompts"),
        (dict(negative_prompt=[1, 2]), "negative_prompt 1 is no text; negative_prompt 2 is no text"),
        (dict(num_inference_steps=0), "num_inference_steps=0: choose a whole number of at least 1"),
        (dict(guidance_scale=float("nan"), height=33), "guidance_scale=nan: .*; height=33: choose a multiple of"),
        (dict(output_type="latent"), "output_type='latent': choose from pil, np, pt"),
    ],
)
def test_bad_arguments_are_told(options, problem, pipeline):
    with pytest.raises(ValueError, match=problem):
        pipeline(PROMPTS[:2], **options)


def test_a_loaded_pipeline_gets_a_value_encoder(pipeline, exported, published):
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    base = StableDiffusionPipeline.from_pretrained(published, safety_checker=None)
    how = dict(custom_pipeline=str(exported), trust_remote_code=True, value_encoder=str(exported))
    taken = DiffusionPipeline.from_pipe(base, **how)
    taken.set_progress_bar_config(disable=True)
    settings = dict(latents=noise(PROMPTS[:1], 1), num_inference_steps=1, output_type="np")
    np.testing.assert_array_equal(*(pipe(PROMPTS[0], VALUE, **settings).images for pipe in (pipeline, taken)))
    assert taken.unet is base.unet


def test_each_prompt_has_its_own_negative_prompt(pipeline):
    settings = dict(num_inference_steps=2, guidance_scale=5.0, output_type="np")
    latents = noise(PROMPTS[:1], 1).repeat(2, 1, 1, 1)
    both = pipeline([PROMPTS[0]] * 2, negative_prompt=["bloody", "blue"], latents=latents, **settings).images
    for image, negative in zip(both, ("bloody", "blue")):
        (alone,) = pipeline(PROMPTS[0], negative_prompt=negative, latents=latents[:1], **settings).images
        np.testing.assert_allclose(image, alone, atol=1e-4)
    assert np.abs(both[0] - both[1]).max() > 1e-3


def test_words_of_textual_inversions_are_read_whole_or_refused(pipeline):
    """Of several vectors all of them; a value encoder has none of these words."""
    pipe, width = copy.copy(pipeline), pipeline.text_encoder.config.hidden_size
    pipe.tokenizer, pipe.text_encoder = copy.deepcopy(pipeline.tokenizer), copy.deepcopy(pipeline.text_encoder)
    pipe.load_textual_inversion({"<y>": torch.ones(3, width)})
    last = len(pipe.tokenizer)
    assert [i for i in pipe._tokenize(["a <y>"], pipe.tokenizer)[0].tolist() if last - 3 <= i < last] == [
        last - 3, last - 2, last - 1
    ]  # fmt: skip
    with pytest.raises(ValueError, match="a prompt has a word of a textual inversion, which no value encoder can read"):
        pipe("a <y>", VALUE, num_inference_steps=1)


def test_what_is_not_finite_is_no_image(pipeline):
    with pytest.raises(FloatingPointError, match="images are not finite: .*guidance_scale=3e.38"):
        pipeline(PROMPTS[0], guidance_scale=3e38, num_inference_steps=2)


def test_auto_needs_rules(pipeline):
    """As an official value encoder has none."""
    known = pipeline.value_encoder.config.livo
    try:
        del pipeline.value_encoder.config.livo
        with pytest.raises(ValueError, match="values='auto' goes by keywords alone, and needs values that have some"):
            pipeline(PROMPTS[0], "auto")
    finally:
        pipeline.value_encoder.config.livo = known


def test_auto_says_where_it_knows_less(pipeline):
    known = pipeline.value_encoder.config.livo
    asking = [value | {"auto": ["keywords", "first_steps"]} for value in known["values"]]
    try:
        pipeline.value_encoder.config.livo = known | {"values": asking}
        with pytest.warns(
            UserWarning, match="goes by keywords alone; its principles also asked first_steps for bloody,"
        ):
            pipeline._choose(["a baker"], ["auto"], 1.0, None)
    finally:
        pipeline.value_encoder.config.livo = known
