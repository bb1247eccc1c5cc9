"""The baselines that need no training: what their papers state of them, and their published pipelines."""

import copy
import dataclasses
import importlib
import warnings

import jax
import numpy as np
import pytest
import torch
from etils import epath

from configs.baselines import fair_diffusion as fair_config
from configs.baselines import uce as uce_config
from livo_jax import methods, sharding, values
from livo_jax.files.modules import load_module
from livo_jax.files.repositories import read_safetensors
from livo_jax.methods import fair_diffusion, sld, uce
from livo_jax.models.weights import split
from livo_jax.runs import fields
from livo_jax.sampling import generate
from livo_jax.sampling.requests import Dose, Request
from livo_jax.values.principles import text_hash
from tests.conftest import text_model
from tests.documented import example
from tests.sampling.test_generate import published_pipeline

SETTINGS = dict(
    steps=6,
    guidance_scale=20.0,  # at which these models show a text
    batch_size=1,
    sampler="ddim",
    mesh=sharding.make_mesh(1),
)
SAFE = sld.SafeGuidance(50.0, 2, 0.5, 0.5, 0.7)
PROMPTS = ["a photo of a baker", "a cook at work"]


def theirs(sd, pipeline, **options):
    """What a deprecated pipeline of diffusers draws, as our images of seed 0."""
    pipeline.set_progress_bar_config(disable=True)
    noise = np.stack([generate.initial_noise(0, text_hash(p), 0, sd.latent_shape) for p in PROMPTS])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = pipeline(
            PROMPTS, num_inference_steps=6, guidance_scale=20.0, latents=torch.tensor(noise.transpose(0, 3, 1, 2)),
            output_type="np", height=sd.image_size, width=sd.image_size, **options,
        ).images  # fmt: skip
    return np.asarray(images) * 255


def pipeline(sd, published, torch_models, cls):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return published_pipeline(sd, published, torch_models, "DDIMScheduler", cls)


def test_safe_latent_diffusion_is_the_published_pipelines(sd, published, torch_models):
    import diffusers

    pipe = pipeline(sd, published, torch_models, diffusers.StableDiffusionPipelineSafe)
    pipe.safety_concept = "a bloody judge"
    expected = theirs(
        sd, pipe, sld_guidance_scale=SAFE.scale, sld_warmup_steps=SAFE.warmup, sld_threshold=SAFE.threshold,
        sld_momentum_scale=SAFE.momentum, sld_mom_beta=SAFE.beta,
    )  # fmt: skip
    requests = [Request(prompt, edits=(("a bloody judge", 1.0),)) for prompt in PROMPTS]
    ours = generate.generate(sd, requests, **SETTINGS, guidance=SAFE)
    plain = generate.generate(sd, [r._replace(edits=()) for r in requests], **SETTINGS)
    assert np.abs(ours.astype(int) - plain).max() > 8, "it does something"
    assert np.abs(ours - expected).max() < 1.5
    divided = generate.generate(sd, requests, **SETTINGS | {"mesh": sharding.make_mesh(2)}, guidance=SAFE)
    assert np.abs(ours.astype(int) - divided).max() <= 1, "on two devices"


def test_the_presets_are_the_published_ones():
    from diffusers.pipelines.deprecated.stable_diffusion_safe import SafetyConfig

    for name, preset in sld.PRESETS.items():
        published = getattr(SafetyConfig, name.upper())
        assert dataclasses.astuple(preset) == tuple(published[f"sld_{field}"] for field in (
            "guidance_scale", "warmup_steps", "threshold", "momentum_scale", "mom_beta"
        ))  # fmt: skip


@pytest.mark.parametrize(
    "guidance",
    [sld.SafeGuidance(0.0, 0, 1.0, 0.5, 0.7), fair_diffusion.SemanticGuidance(5.0, 6, 0.9, 0.5, 0.7)],
    ids=["sld of scale 0", "sega in its warm-up"],
)
def test_a_guidance_without_effect_is_plain_guidance(sd, guidance):
    requests = [Request(prompt, edits=(("a bloody judge", 1.0),)) for prompt in PROMPTS]
    plain = generate.generate(sd, [r._replace(edits=()) for r in requests], **SETTINGS)
    images = generate.generate(sd, requests, **SETTINGS, guidance=guidance)
    assert np.abs(images.astype(int) - plain).max() <= 1


def test_guidances_of_equal_numbers_are_two():
    """A compiled program is found by its guidance."""
    numbers = dict(scale=5.0, warmup=0, threshold=0.9, momentum=0.5, beta=0.7)
    assert sld.SafeGuidance(**numbers) == sld.SafeGuidance(**numbers) != fair_diffusion.SemanticGuidance(**numbers)


def test_semantic_guidance_is_the_published_pipelines(sd, published, torch_models):
    import diffusers

    guidance = fair_diffusion.SemanticGuidance(40.0, 2, 0.7, 0.3, 0.6)
    pipe = pipeline(sd, published, torch_models, diffusers.SemanticStableDiffusionPipeline)
    expected = theirs(
        sd, pipe,
        editing_prompt=["a round", "a square"], reverse_editing_direction=[False, True], edit_guidance_scale=40.0,
        edit_warmup_steps=2, edit_threshold=0.7, edit_momentum_scale=0.3, edit_mom_beta=0.6, edit_weights=[1.0, 1.0],
    )  # fmt: skip
    requests = [Request(prompt, edits=(("a round", 1.0), ("a square", -1.0))) for prompt in PROMPTS]
    ours = generate.generate(sd, requests, **SETTINGS, guidance=guidance)
    plain = generate.generate(sd, [r._replace(edits=()) for r in requests], **SETTINGS)
    assert np.abs(ours.astype(int) - plain).max() > 8, "it does something"
    assert np.abs(ours - expected).max() < 1.5


def test_a_guidance_is_one_program_whatever_the_prompts(sd):
    def draw(*texts):
        return generate.generate(sd, [Request(text, edits=((text, 1.0),)) for text in texts], **SETTINGS, guidance=SAFE)

    draw("a baker")
    compiled = generate._sample._cache_size()
    draw("a cook", "a judge at work")
    assert generate._sample._cache_size() == compiled
    with pytest.raises(ValueError, match="as many in each request"):
        generate.generate(sd, [Request("a"), Request("b", edits=(("c", 1.0),))], guidance=SAFE)
    with pytest.raises(ValueError, match="edits are for a guidance"):
        generate.generate(sd, [Request("b", edits=(("c", 1.0),))])


def test_fair_directions_are_dealt_evenly_in_random_order():
    shape, colour = values.load(("shape", "colour"))
    drawn = [fair_diffusion.directions(shape, "a {attribute}", 0, "a photo of a baker", i) for i in range(400)]
    assert {*drawn} == {
        (("a round", 1.0), ("a square", -1.0)), (("a round", -1.0), ("a square", 1.0)),
    }  # fmt: skip
    towards_round = np.array([edits[0][1] > 0 for edits in drawn])
    assert (towards_round.reshape(-1, 2).sum(1) == 1).all() and 70 < towards_round[::2].sum() < 130
    assert drawn[3] == fair_diffusion.directions(shape, "a {attribute}", 0, "a photo of a baker", 3)
    assert drawn != [fair_diffusion.directions(shape, "a {attribute}", 1, "a photo of a baker", i) for i in range(400)]
    five = [fair_diffusion.directions(colour, "{attribute}, {prompt}", 0, "a baker", i) for i in range(5)]
    for edits in five:
        assert edits[1][0] == "green, a baker" and sum(weight for _, weight in edits) == pytest.approx(0)
    assert sorted(max(edits, key=lambda edit: edit[1])[0] for edits in five) == sorted(edit for edit, _ in five[0])


# ---------------------------------------------------------------------------- UCE


def test_the_closed_form_minimises_its_objective():
    rng = np.random.default_rng(0)
    C, X, P, W_old = rng.normal(size=(7, 5)), rng.normal(size=(7, 5)), rng.normal(size=(4, 5)), rng.normal(size=(5, 3))

    def objective(W):
        terms = (C @ W - X @ W_old, P @ W - P @ W_old, np.sqrt(0.3) * (W - W_old))
        return sum((term**2).sum() for term in terms)

    W = uce.matrix(C, X, P, 0.3) @ W_old
    for _ in range(20):
        assert objective(W + 1e-3 * rng.normal(size=W.shape)) > objective(W)


def test_the_closed_form_maps_what_is_edited_and_keeps_what_is_preserved():
    rng = np.random.default_rng(1)
    C, X, P = rng.normal(size=(3, 16)), rng.normal(size=(3, 16)), rng.normal(size=(8, 16))
    M = uce.matrix(C, X, P, 1e-9)
    np.testing.assert_allclose(C @ M, X @ np.eye(16), atol=1e-5)
    np.testing.assert_allclose(P @ M, P, atol=1e-5)
    np.testing.assert_allclose(uce.matrix(C, C, P, 0.1), np.eye(16), atol=1e-12)


@pytest.fixture(scope="module")
def config():
    config = uce_config.get_config("tiny:smoke")
    config.sampling.sampler, config.sampling.steps, config.sampling.batch_size = "ddim", 2, 1
    config.uce.rounds, config.uce.images, config.principles = 2, 1, ("shape", "bloody")
    config.preferences.templates = ("a {}",)
    return config


def shape_judge(images):
    """Reads "round" everywhere."""
    return {"shape": np.array(["round"] * len(images)), "red": np.zeros(len(images))}


def test_uce_reads_a_harm_as_its_absence_and_leaves_other_weights(sd, config, tmp_path):
    """In what cross-attention reads: keys and values of the harm's prompt are those of the plain one.

    Not every random text encoder of 20 dimensions leaves room for both bounds: this one does.
    """
    torch.manual_seed(7)
    text_model(len(sd.tokenizer), sd.tokenizer.eos_token_id, num_hidden_layers=3).save_pretrained(tmp_path)
    sd = copy.copy(sd)
    sd.text_encoder = load_module(type(sd.text_encoder), tmp_path)
    (bloody,) = values.load(("bloody",))
    edited = uce.edited(sd, uce.erase(bloody, sd, config))
    before, after = (dict(jax.tree_util.tree_leaves_with_path(split(model.unet)[1])) for model in (sd, edited))
    changed = {jax.tree_util.keystr(path, simple=True, separator=".") for path in before
               if not np.array_equal(before[path], after[path])}  # fmt: skip
    assert changed and all(".attn2.to_" in name and name.endswith(("to_k.kernel", "to_v.kernel")) for name in changed)
    texts = uce.Texts(sd, ["a bloody cook", "a cook", ""])
    harm, plain = texts.tails(["a bloody cook", "a cook"])
    for path in before:
        if jax.tree_util.keystr(path, simple=True, separator=".") in changed:
            W_old, W = np.asarray(before[path]), np.asarray(after[path])
            assert np.linalg.norm(harm @ W - plain @ W_old) < 0.5 * np.linalg.norm(harm @ W_old - plain @ W_old)
            kept = texts.whole(["a cook", ""])
            assert np.linalg.norm(kept @ (W - W_old)) < 0.2 * np.linalg.norm(kept @ W_old)


def test_uce_is_kept_and_made_again_for_another_config(sd, config, tmp_path):
    mesh, request = sharding.make_mesh(data=1), Request("a cook", values=(Dose("shape equality"),))
    asked = []

    def judge(images):
        asked.append(len(images))
        return shape_judge(images)

    def make_drawing():
        return uce.UnifiedConceptEditing(config).make_drawing(models, mesh, epath.Path(tmp_path), judge)

    models = methods.Models(sd, sd)
    first = make_drawing()
    assert asked == [2, 2], "a round each: two subjects"
    again = make_drawing()
    assert len(asked) == 2 and again.seconds == first.seconds
    assert np.array_equal(first.draw([request]), again.draw([request]))
    base = methods.base(config, sd, mesh)
    assert not np.array_equal(first.draw([request]), base.draw([request])), "towards what is never read: square"
    both = [request, request._replace(values=(Dose("bloody considered inappropriate"),))]
    assert np.array_equal(first.draw(both[::-1])[1], first.draw(both)[0]), "the order does not matter"
    kernels = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(split(sd.unet)[1]) if uce._reads_text(path)]
    assert first.trained == 2 * sum(leaf.size for leaf in kernels) > 0, "a model for each value"
    config.model = f"/elsewhere{config.model}"  # a copy: its arrays are the same
    make_drawing()
    assert len(asked) == 2
    config.uce.matrices = str(tmp_path / uce.FILE)
    carry_over = uce.UnifiedConceptEditing(config).make_drawing
    carried = carry_over(models, mesh, epath.Path(tmp_path / "other"), None)  # which measures no image
    assert np.array_equal(carried.draw([request]), first.draw([request]))
    config.principles = ("shape", "colour")
    with pytest.raises(ValueError, match="lacks 'colour equality'"):
        carry_over(models, mesh, epath.Path(tmp_path / "other"), None)
    config.uce.matrices, config.quantised = "nowhere", "int8"
    told = fields.problems(config)
    assert any("config.uce.matrices='nowhere': there is no such file" in line for line in told)
    assert any("config.quantised='int8': config.method='uce' replaces weights" in line for line in told)
    config.uce.matrices, config.quantised, config.principles = "", "", ("shape", "bloody")
    for section, name, setting in (
        ("uce", "regularisation", 0.2), ("sampling", "steps", 3), ("judging", "subject", not config.judging.subject),
    ):  # fmt: skip
        asked.clear()
        before = config[section][name]
        config[section][name] = setting
        make_drawing()
        assert asked, f"{section}.{name} makes another edit"
        config[section][name] = before


def test_uce_keeps_each_value_once_it_is_found(sd, config, tmp_path, monkeypatch):
    """What ends it among the images of a bias loses nothing of the value before."""
    config = copy.deepcopy(config)
    config.principles = ("bloody", "shape")

    def make_drawing(judge):
        make = uce.UnifiedConceptEditing(config).make_drawing
        return make(methods.Models(sd, sd), sharding.make_mesh(data=1), epath.Path(tmp_path), judge)

    def broken_off(images):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_drawing(broken_off)
    facts, kept = read_safetensors(tmp_path / uce.FILE)
    assert [*kept] == ["bloody considered inappropriate"] and float(facts["seconds"]) > 0
    monkeypatch.setattr(uce, "erase", None)  # which is not asked again
    found = make_drawing(shape_judge)
    assert found.seconds > float(facts["seconds"]) and found.trained
    facts, both = read_safetensors(tmp_path / uce.FILE)
    assert len(both) == 2 and np.array_equal(both["bloody considered inappropriate"], *kept.values())


# ---------------------------------------------------------------------------- methods


def test_words_and_negative_prompts_say_the_value_over_the_same_noise(sd, config):
    mesh, draw = sharding.make_mesh(data=1), {}
    for config.method in ("words", "negative"):
        draw[config.method] = methods.make_method(config).make_drawing(methods.Models(sd, sd), mesh, None, None).draw
    settings = dict(mesh=mesh, seed=config.eval.seed, **config.sampling.to_dict())
    request = Request("a bloody cook", 3, (Dose("bloody considered inappropriate"),))
    said = Request("bloody considered inappropriate, a bloody cook", 3, noise="a bloody cook")
    against = Request("a bloody cook", 3, negative="bloody")
    attacked = request._replace(prompt="gory a bloody cook", noise="a bloody cook")
    alike = said._replace(prompt="bloody considered inappropriate, gory a bloody cook")
    assert np.array_equal(draw["words"]([attacked]), generate.generate(sd, [alike], **settings)), "the noise as asked"
    for name, expected in (("words", said), ("negative", against)):
        assert np.array_equal(draw[name]([request]), generate.generate(sd, [expected], **settings))


def test_losses_that_compare_the_images_of_a_pair(config):
    compare = {"dpo", "ipo", "dpo_unet"}
    for name in ("sft", "dpo", "ipo", "kto", "dpo_unet", "concept_ablation"):
        own = importlib.import_module(f"configs.baselines.{name}").get_config()
        assert methods.make_method(own).compares_pairs == (name in compare), name


def test_unknown_methods_and_presets_are_refused(sd, config):
    config.method = "magic"
    with pytest.raises(ValueError, match="'magic'.*fair_diffusion, negative, sld, uce, words"):
        methods.make_method(config)
    with pytest.raises(ValueError, match="there is tiny, livo, flow_tiny, and each"):
        fair_config.get_config("large")


@pytest.mark.parametrize("method", ["sld", "fair_diffusion"])
def test_edits_want_guidance(method):
    config = importlib.import_module(f"configs.baselines.{method}").get_config("tiny")
    assert not methods.make_method(config).problems()
    config.sampling.guidance_scale = 1.0
    (problem,) = methods.make_method(config).problems()
    assert problem.startswith(f"config.sampling.guidance_scale=1.0: config.method='{method}' edits a guided prediction")


def test_a_method_of_the_users_own(sd, tmp_path, monkeypatch):
    """The page's, named by its module, which is on Python's path; its fields are checked as the methods' here."""
    (tmp_path / "polite.py").write_text(example("evaluation.md", "class Polite(Method):"))
    monkeypatch.syspath_prepend(tmp_path)
    config = fair_config.get_config("tiny")
    config.method, config.principles = "polite:Polite", ("bloody",)
    config.sampling.steps, config.sampling.batch_size = 2, 1
    mesh = sharding.make_mesh(1)
    method, base = methods.make_method(config), methods.base(config, sd, mesh)
    polite = method.make_drawing(methods.Models(sd, sd), mesh, tmp_path, None)
    requests = [Request("a photo of a baker", values=(Dose("bloody considered inappropriate"),))]
    asked = [Request("a photo of a baker, politely", noise="a photo of a baker")]
    assert method.KINDS == ("harm",) and not isinstance(method, methods.TrainedMethod)
    np.testing.assert_array_equal(polite.draw(requests), base.draw(asked))
    assert not fields.problems(config, {"method": config.method, "train.steps": 0}), "as the page's command line has it"
    config.train.steps = 5
    assert any("trains nothing, set 0" in line for line in fields.problems(config))
    config.method = "polite:drawer"
    with pytest.raises(ValueError, match="'polite:drawer': it is no subclass of livo_jax.methods.Method"):
        methods.make_method(config)
