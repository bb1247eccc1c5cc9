"""Stable Diffusion XL: a tiny random one computes what diffusers does, in sampling and in a LiVO step."""

import copy
import dataclasses
import functools
import importlib
import json
import math
import pathlib
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from PIL import Image

from configs import tiny
from livo_jax import StableDiffusion, ValueEncoder, methods, sharding, value_encoders, values
from livo_jax.export import export
from livo_jax.export.export import SCHEDULERS
from livo_jax.files.modules import PARTS, skeleton
from livo_jax.files.repositories import read_json
from livo_jax.methods import uce
from livo_jax.models.weights import TO_PUBLISHED, published_name, split, to_published
from livo_jax.runs import restore, train
from livo_jax.sampling import generate, pairs
from livo_jax.sampling.requests import Dose, Request
from livo_jax.training.batch import Batch, draw_noise
from livo_jax.training.objective import make_loss, split_models
from livo_jax.training.optimizer import but_embeddings, make_optimizer
from livo_jax.training.step import init_state, make_train_step
from livo_jax.value_encoders.lora import LoRA
from livo_jax.value_encoders.shelf import Shelf
from livo_jax.value_encoders.soft_tokens import SoftTokens
from livo_jax.values.principles import text_hash
from tests import small_run
from tests.conftest import LEVELS, UNET, VAE, randomised, text_model, write_pipeline
from tests.data import test_data
from tests.runs.test_run import run
from tests.training.test_train import CONFIG, torch_step

INDEX = {
    "_class_name": "StableDiffusionXLPipeline", "_diffusers_version": "0.27.0", "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1,
    "beta_schedule": "scaled_linear", "timestep_spacing": "leading",
}  # fmt: skip
PROMPTS = ["a photo of a baker", "a cook at work"]
VALUE, OTHER = "shape equality", "colour equality"
SETTINGS = dict(steps=3, guidance_scale=3.0, sampler="euler", batch_size=1, mesh=sharding.make_mesh(1))


@pytest.fixture(scope="module")
def theirs(tokenizer_dir):
    """Random PyTorch models of a tiny Stable Diffusion XL, no two widths alike."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tokenizer_dir)
    one = text_model(len(tokenizer), tokenizer.eos_token_id)
    settings = {
        **one.config.to_dict(),
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "projection_dim": 10,
        "pad_token_id": 0,
    }
    two = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig.from_dict(settings))
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, cross_attention_dim=44, attention_head_dim=(1, 2), transformer_layers_per_block=(1, 2), **LEVELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=6,
        projection_class_embeddings_input_dim=46,
    )  # fmt: skip
    parts = dict(unet=unet, vae=diffusers.AutoencoderKL(**VAE), text_encoder=one, text_encoder_2=two)
    return {name: randomised(module) for name, module in parts.items()}


@pytest.fixture(scope="module")
def published(theirs, tokenizer_dir, tmp_path_factory):
    root = write_pipeline(tmp_path_factory.mktemp("sdxl"), theirs, tokenizer_dir, SCHEDULER, INDEX)
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):  # as published
        file = root / name / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": pad}))
    return root


@pytest.fixture(scope="module")
def sd(published):
    return StableDiffusion.from_pretrained(published)


@pytest.fixture(scope="module")
def small_sd15(theirs, published, tmp_path_factory):
    """A Stable Diffusion 1.x with the same first text encoder."""
    import diffusers

    root = tmp_path_factory.mktemp("sd15")
    shutil.copytree(published, root, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*_2"))
    (root / "model_index.json").write_text(json.dumps(INDEX | {"text_encoder_2": [None, None]}))
    diffusers.UNet2DConditionModel(**UNET).save_pretrained(root / "unet")
    return StableDiffusion.from_pretrained(root)


@pytest.fixture(scope="module")
def config(published):
    config = tiny.get_config()
    config.model, config.principles, config.data.attributes = str(published), ("shape", "colour"), 0.0
    config.value_encoder.update(rank=3, alpha=6.0, tokens=2)
    config.sampling.update(sampler="euler", steps=3, guidance_scale=3.0)
    return config


def of_kind(config, kind: str, **settings):
    config = config.copy_and_resolve_references()
    config.value_encoder.update(kind=kind, **settings)
    return config


@pytest.fixture(scope="module")
def made(sd, config):
    """kind -> a value encoder of it, as after some training."""
    rng, made = np.random.default_rng(0), {}
    for kind in value_encoders.KINDS:
        graph, params = split(value_encoders.start(of_kind(config, kind), sd, sharding.make_mesh()))
        noise = jax.tree.map(lambda x: rng.normal(0, 3.0 if kind == "token" else 0.1, x.shape), params)  # noqa: B023
        made[kind] = nnx.merge(graph, jax.tree.map(lambda x, noise: x + np.float32(noise), params, noise))
    return made


# ---------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    "sampler, negative, zeros", [("euler", "", True), ("euler", "", False), ("dpmsolver++", "a tailor", True)]
)
def test_images_are_the_published_pipelines(sd, published, theirs, monkeypatch, sampler, negative, zeros):
    """Tokens to pixels, against diffusers' StableDiffusionXLPipeline from the same noise."""
    import diffusers
    from transformers import CLIPTokenizer

    scheduler, options = SCHEDULERS[sampler]
    pipeline = diffusers.StableDiffusionXLPipeline(
        **theirs, **{name: CLIPTokenizer.from_pretrained(published / name) for name in ("tokenizer", "tokenizer_2")},
        scheduler=getattr(diffusers, scheduler).from_config(SCHEDULER, **options), force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    noise = np.stack([generate.initial_noise(5, text_hash(p), 0, sd.latent_shape) for p in PROMPTS])
    expected = pipeline(
        PROMPTS, negative_prompt=[negative] * 2 if negative else None, num_inference_steps=3, guidance_scale=3.0,
        latents=torch.tensor(noise.transpose(0, 3, 1, 2)), output_type="np",
    ).images  # fmt: skip
    monkeypatch.setattr(sd, "zeros_for_empty_prompt", zeros)
    requests = [Request(p, negative=negative) for p in PROMPTS]
    ours = generate.generate(sd, requests, seed=5, **SETTINGS | {"sampler": sampler})
    assert ours.shape == (2, 16, 16, 3)
    assert np.abs(ours - expected * 255).max() < 1.0, "equal but for rounding to bytes"


def test_each_tokenizer_pads_as_it_does(sd):
    ids = sd.tokenize(PROMPTS)
    assert ids.shape == (2, 2, 16)
    eos = sd.tokenizer.eos_token_id
    for one, two in ids:
        end = list(one).index(eos)
        np.testing.assert_array_equal(one[: end + 1], two[: end + 1])
        assert set(one[end:]) == {eos} and set(two[end + 1 :]) == {0}


@pytest.mark.parametrize("kind", value_encoders.KINDS)
def test_values_of_each_kind(sd, made, kind):
    """No value is the base, a value is not, and strength is a dial: of several in one batch."""
    doses = [(), (Dose(VALUE),), (Dose(VALUE, 1e-6),), (Dose(VALUE), Dose(OTHER)), (Dose(OTHER), Dose(VALUE))]
    requests = [Request("a baker", 0, values) for values in doses]
    images = generate.generate(sd, requests, made[kind], **SETTINGS).astype(int)
    base = generate.generate(sd, requests[:1], **SETTINGS)[0]
    differ = [bool(np.abs(image - base).max() > 1) for image in images]
    assert differ == [False, True, False, True, True]
    assert np.abs(images[3] - images[4]).max() <= 1 < np.abs(images[3] - images[1]).max()


# ---------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", value_encoders.KINDS)
def test_the_exported_pipeline_draws_the_same_images(sd, made, config, published, tmp_path, kind):
    """As JAX from the same noise, values of several strengths, and the export is read again."""
    from diffusers import DiffusionPipeline

    config, out = of_kind(config, kind), tmp_path / "livo"
    export.export(out, sd, made[kind], config)
    again = value_encoders.start(of_kind(config, kind, start=str(out)), sd, sharding.make_mesh())
    jax.tree.map(np.testing.assert_array_equal, split(again)[1], split(made[kind])[1])
    pipeline = DiffusionPipeline.from_pretrained(published, custom_pipeline=str(out), trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    noise = np.stack([generate.initial_noise(5, text_hash(p), 0, sd.latent_shape) for p in PROMPTS])
    settings = dict(strength={VALUE: 0.5})
    values = [[VALUE, OTHER], OTHER]
    theirs = pipeline(PROMPTS, values, latents=torch.tensor(noise.transpose(0, 3, 1, 2)), output_type="np", **settings)
    ours = sd.generate(PROMPTS, values, made[kind], seed=5, **settings, **SETTINGS)
    assert np.abs(ours - theirs.images * 255).max() < 1.0
    base = sd.generate(PROMPTS, seed=5, **SETTINGS)
    assert (np.abs(ours.astype(int) - base).max((1, 2, 3)) > 1).all()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft, of transformers
def test_adapters_are_pefts(sd, made, theirs, config, tmp_path):
    """One for each tower; peft loads them on its text encoders, and the pooled outputs are ours."""
    from peft import PeftModel

    made["lora"].save(tmp_path / "adapter", config.model)
    adapted = [
        PeftModel.from_pretrained(copy.deepcopy(theirs[name]), tmp_path / folder).eval().base_model.model
        for name, folder in (("text_encoder", "adapter"), ("text_encoder_2", "adapter_2"))
    ]
    ids = sd.tokenize([f"{VALUE}, {prompt}" for prompt in PROMPTS])
    with torch.no_grad():
        pooled = Towers(*adapted)(torch.tensor(ids)).pooler_output
    np.testing.assert_allclose(made["lora"].tokens(ids, sd.text_encoder)[:, 0], pooled, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit(sd, made, config, published, small_sd15, tmp_path):
    """Errors name both sides: value encoders and adapters of 1.x and XL, of another base, and parts of a model."""
    one = ValueEncoder.from_pretrained(small_sd15.root, subfolder="text_encoder")
    both = "for another model:\n  hidden_size: 20 in the value encoder, 20 and 24 in the text encoder of .*sdxl"
    with pytest.raises(ValueError, match=both):
        generate.generate(sd, [Request("a cook", 0, (Dose(VALUE),))], one)
    with pytest.raises(ValueError, match="hidden_size: 20 and 24 in the value encoder, 20 in the text encoder of"):
        generate.generate(small_sd15, [Request("a cook", 0, (Dose(VALUE),))], made["full"])
    made["lora"].save(tmp_path / "adapter", "the-base")
    with pytest.raises(
        ValueError, match="adapter of 'the-base', does not fit .*: it is for 2 text encoders, there are 1"
    ):
        LoRA.from_pretrained(tmp_path, small_sd15)
    with pytest.warns(UserWarning, match="trained on 'the-base' and is used on .*sdxl"):
        LoRA.from_pretrained(tmp_path, sd)
    shutil.rmtree(tmp_path / "adapter_2")
    with pytest.raises(ValueError, match="it is for 1 text encoders, there are 2"):
        LoRA.from_pretrained(tmp_path, sd)

    made["token"].save(tmp_path / "soft", "the-base")
    with pytest.raises(ValueError, match="of 'the-base', has tokens of width 44; those of .* are 20 wide"):
        SoftTokens.from_pretrained(tmp_path / "soft", small_sd15)
    text_encoder = small_sd15.root / "text_encoder"
    with pytest.raises(ValueError, match=both):  # before training
        restore.load_models(of_kind(config, "full", start=str(text_encoder)), sharding.make_mesh(), sd)
    shutil.copytree(text_encoder, tmp_path / "shelf" / "one")
    values = {"shape": {"statement": VALUE, "kind": "full", "folder": "one"}}
    (tmp_path / "shelf" / "shelf.json").write_text(json.dumps({"base": sd.name, "values": values}))
    with pytest.raises(ValueError, match=f"shelf/one: the value encoder was made {both}"):
        sd.generate(["a cook"], "shape", Shelf(tmp_path / "shelf", sd))

    def broken(part, **changes):
        root = tmp_path / part
        shutil.copytree(published, root)
        file = root / (part if part == "model_index.json" else f"{part}/config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return root

    with pytest.raises(ValueError, match="20 wide, its UNet wants 44; its UNet wants the pooled text of"):
        StableDiffusion.from_pretrained(broken("model_index.json", text_encoder_2=[None, None]))
    with pytest.raises(ValueError, match="pooled text and sizes are 46 wide, its UNet wants 50"):
        StableDiffusion.from_pretrained(broken("unet", projection_class_embeddings_input_dim=50))


# ---------------------------------------------------------------------------- the full size

COUNTS = dict(  # published
    unet=2_567_463_684, text_encoder=123_060_480, text_encoder_2=694_659_840, vae=83_653_863
)  # fmt: skip


@pytest.mark.slow
def test_the_full_size_has_the_published_names_and_shapes():
    """By abstract evaluation, against PyTorch's on the meta device."""
    import diffusers
    import transformers

    root = pathlib.Path(__file__).parents[2] / "benchmarks" / "sdxl"
    config = {part: {k: v for k, v in read_json(root / part / "config.json").items() if k[0] != "_"} for part in COUNTS}
    of = transformers.CLIPTextConfig.from_dict
    with torch.device("meta"):
        theirs = dict(
            unet=diffusers.UNet2DConditionModel(**config["unet"]), vae=diffusers.AutoencoderKL(**config["vae"]),
            text_encoder=transformers.CLIPTextModel(of(config["text_encoder"])),
            text_encoder_2=transformers.CLIPTextModelWithProjection(of(config["text_encoder_2"])),
        )  # fmt: skip
    for part, count in COUNTS.items():
        _, abstract = skeleton(PARTS[part][0], root / part)
        shapes = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
            order = TO_PUBLISHED.get(leaf.ndim) if path[-1].key == "kernel" else None
            shapes[published_name(path)] = tuple(leaf.shape[i] for i in order) if order else leaf.shape
        expected = {n.removeprefix("text_model."): tuple(p.shape) for n, p in theirs[part].named_parameters()}
        assert shapes == expected
        assert sum(math.prod(shape) for shape in shapes.values()) == count


# ---------------------------------------------------------------------------- training


class Towers(torch.nn.Module):
    """Two text encoders in PyTorch, called as one with ids [B, 2, L]."""

    def __init__(self, one, two):
        super().__init__()
        self.text_encoder, self.text_encoder_2 = one, two

    def forward(self, ids):
        outs = [tower(x, output_hidden_states=True) for tower, x in zip(self.children(), ids.unbind(1))]
        end = (ids == self.text_encoder.config.eos_token_id).int().argmax(-1)  # [B, 2]
        rows = torch.arange(len(ids))
        return SimpleNamespace(
            last_hidden_state=torch.cat([out.hidden_states[-2] for out in outs], dim=-1),
            pooler_output=torch.cat([out.last_hidden_state[rows, e] for out, e in zip(outs, end.T)], dim=-1),
            text_embeds=outs[1].text_embeds,
        )


@pytest.fixture(scope="module")
def batch(sd):
    rng = np.random.default_rng(0)
    images = {side: rng.uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32) for side in ("aligned", "violating")}
    values = [f"{VALUE}, {prompt}" for prompt in PROMPTS]
    return Batch(sd.tokenize(values), prompt_ids=sd.tokenize(PROMPTS), **images)


def gradients(sd, value_encoder, batch):
    """Gradients of a step, by our names, and its loss."""
    networks, params, frozen = split_models(sd, value_encoder, with_vae=True)
    tx = optax.trace(0.0)  # its state is the gradient
    step = jax.jit(make_train_step(networks, tx, CONFIG, make_loss(networks, CONFIG)))
    state, metrics = step(init_state(params, tx), frozen, batch)
    return to_published(state["opt_state"].trace), float(metrics["loss"])


def test_a_step_is_pytorchs(sd, config, theirs, batch):
    """Loss and gradients of both towers; the pooled text of policy and reference is the prompt's."""
    value_encoder = value_encoders.start(of_kind(config, "full"), sd, sharding.make_mesh())
    ours, loss = gradients(sd, value_encoder, batch)
    frozen, trained = (Towers(theirs["text_encoder"], theirs["text_encoder_2"]) for _ in range(2))
    trained = copy.deepcopy(trained)
    with torch.no_grad():
        added = {"text_embeds": frozen(torch.tensor(batch.prompt_ids)).text_embeds}
    added["time_ids"] = torch.tensor(sd.time_ids).expand(2, 6)
    unet = functools.partial(theirs["unet"], added_cond_kwargs=added)
    models = dict(unet=unet, vae=theirs["vae"], text_encoder=frozen)
    expected, _ = torch_step(models, trained, batch, CONFIG, sd.scheduler_config)
    assert loss == pytest.approx(expected, rel=1e-4)
    named = {name.replace(".text_model.", "."): p.grad for name, p in trained.named_parameters()}
    assert named.pop("text_encoder_2.text_projection.weight") is None
    assert ours.keys() == named.keys()
    total = np.sqrt(sum(float((gradient**2).sum()) for gradient in named.values()))
    for name, gradient in named.items():
        error = np.abs(ours[name] - gradient.numpy()).max() / max(gradient.abs().max().item(), 1e-3 * total)
        assert error < 1e-3, (name, error)


def test_a_step_from_cached_states_is_the_same(sd, made, batch):
    networks, params, frozen = split_models(sd, made["full"], with_vae=True)
    loss = make_loss(networks, CONFIG)
    noise = draw_noise(jax.random.key(0), (2, *sd.latent_shape), (0, 1000))
    of = jax.jit(lambda batch: loss(params, frozen, batch, noise)[0])
    text = sd.text_encoder(batch.prompt_ids)
    aligned, violating = (jnp.concatenate(sd.vae.encode(x), -1) for x in (batch.aligned, batch.violating))
    cached = Batch(
        batch.value_prompt_ids, prompt_states=text.last_hidden_state, text_embeds=text.text_embeds,
        aligned_moments=aligned, violating_moments=violating,
    )  # fmt: skip
    expected = float(of(batch))
    assert float(of(cached)) == pytest.approx(expected, rel=1e-5)
    other = cached._replace(text_embeds=text.text_embeds + 1)
    assert float(of(other)) != pytest.approx(expected, rel=1e-3)


def test_embeddings_of_both_towers_may_stay(made):
    tower = {"embeddings": False, "encoder": True, "final_layer_norm": True}
    assert but_embeddings(split(made["full"])[1]) == {"text_encoder": tower, "text_encoder_2": tower}
    assert but_embeddings(split(made["lora"])[1]) == {"updates": True}


# ---------------------------------------------------------------------------- a run


# ---------------------------------------------------------------------------- other methods


def test_uce_reads_a_harm_as_its_absence(sd):
    """The states that it edits are of both towers side by side, at the places of a text's words."""
    config = importlib.import_module("configs.baselines.uce").get_config("tiny:smoke")
    texts = uce.Texts(sd, ["a bloody cook", "a cook"])
    harm, plain = texts.tails(["a bloody cook", "a cook"])
    assert harm.shape == plain.shape and harm.shape[1] == 44 and len(harm) > 1
    (bloody,) = values.load(("bloody",))
    M = uce.erase(bloody, sd, config)
    assert np.linalg.norm(harm @ M - plain) < 0.6 * np.linalg.norm(harm - plain)
    edited, plain = (jax.tree.leaves(split(unet)[1]) for unet in (uce.edited(sd, M).unet, sd.unet))
    assert any((a != b).any() for a, b in zip(edited, plain))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("method", ["concept_ablation", "dpo_unet"])
def test_methods_that_train_the_unet_take_a_step(sd, batch, method, prediction_type):
    """On shapes alone."""
    config = importlib.import_module(f"configs.baselines.{method}").get_config("tiny:smoke")
    method, tx = methods.make_method(config), make_optimizer(config)
    networks, params, frozen = split_models(sd, method.make_module(sd), with_vae=True)
    networks = networks._replace(schedule=dataclasses.replace(sd.schedule, prediction_type=prediction_type))
    step = make_train_step(networks, tx, config, method.make_loss(networks))
    state = jax.eval_shape(functools.partial(init_state, tx=tx), params)
    after, _ = jax.eval_shape(step, state, frozen, batch)
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)


def test_safe_diffusion_draws_and_wants_predicted_noise(sd):
    config = importlib.import_module("configs.baselines.sld").get_config("tiny:smoke")
    config.sampling.update(steps=1, sampler="euler", batch_size=1)
    request = Request("a bloody cook", 0, (Dose("bloody considered inappropriate"),))
    method = methods.make_method(config)
    draw = method.make_drawing(methods.Models(sd, sd), SETTINGS["mesh"], None, None).draw
    assert draw([request]).shape == (1, 16, 16, 3)
    velocity = copy.copy(sd)
    velocity.schedule = dataclasses.replace(sd.schedule, prediction_type="v_prediction")
    with pytest.raises(
        ValueError, match="prediction_type='v_prediction', and its scale and threshold are of predicted"
    ):
        method.make_drawing(methods.Models(velocity, velocity), SETTINGS["mesh"], None, None)


@pytest.mark.slow
def test_a_run_from_the_cache_and_from_images(config, tmp_path):
    """Equal losses; resumed, it is bit for bit the same; what it trained is sampled and exported."""
    config = of_kind(config, "full")
    config.data.directory, config.judge = str(test_data.make(tmp_path / "pairs")), ""
    config.train.update(steps=2, warmup_steps=0, batch_size=2)
    config.checkpoint.every = config.log.every = config.mesh.data = 1
    config.sampling.batch_size, config.eval.seen, config.eval.held_out = 2, ("cook",), ("baker",)
    losses = {}
    for name, cache in (("images", False), ("cache", True)):
        config.data.cache = cache
        train.train_and_evaluate(config, tmp_path / name)
        losses[name] = [line["train/loss"] for line in small_run.metrics(tmp_path / name) if "train/loss" in line]
    assert len(losses["cache"]) == 2 and losses["cache"] == pytest.approx(losses["images"], rel=1e-3)
    assert losses["cache"][0] != pytest.approx(losses["cache"][1], rel=1e-6)
    assert (tmp_path / "cache" / "samples" / "step_2.png").exists()

    whole = small_run.final(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache" / "checkpoints" / "2")
    train.train_and_evaluate(config, tmp_path / "cache")
    jax.tree.map(np.testing.assert_array_equal, small_run.final(tmp_path / "cache"), whole)

    mesh = sharding.make_mesh(1)
    sd, value_encoder = restore.restore_run(config, tmp_path / "cache", mesh)
    settings = dict(seed=0, mesh=mesh, options={}, **config.sampling.to_dict())
    pairs.write_pairs(tmp_path / "out", sd, value_encoder, ["a cook"], [VALUE], 2, **settings)
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    export.export(tmp_path / "export", sd, value_encoder, config)
    again = value_encoders.start(of_kind(config, "full", start=str(tmp_path / "export")), sd, mesh)
    jax.tree.map(np.testing.assert_array_equal, split(again)[1], split(value_encoder)[1])
    untrained = split(value_encoders.copy_of(sd.text_encoder))[1]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), split(again)[1], untrained)
    assert all(any(jax.tree.leaves(tower["encoder"])) for tower in moved.values())


@pytest.mark.slow
def test_the_command_line_from_pairs_to_an_export(tmp_path):
    """configs/sdxl.py:smoke, which anyone can run: pairs, cache, two steps, evaluation, images, export and back."""
    command = functools.partial(run, config="configs/sdxl.py:smoke")

    def answer(*arguments):
        process = command(*arguments)
        assert process.returncode == 0, process.stderr
        return process.stdout

    workdir = tmp_path / "run"
    assert "report: " in answer(workdir)
    assert (workdir / "preferences" / "cache" / "text_embeds.npy").exists()
    assert "is finished: its 2 steps are trained and evaluated" in answer(workdir)
    draw = ("--mode=generate", "--prompt=a photo of a cook", "--value=shape", "--num_images=2")
    answer(workdir, *draw, f"--out={tmp_path / 'images'}")
    answer(workdir, "--mode=export", f"--out={tmp_path / 'export'}")
    start = f"--config.value_encoder.start={tmp_path / 'export'}"
    answer(tmp_path / "other", *draw, start, f"--out={tmp_path / 'again'}")
    for file in sorted((tmp_path / "images").iterdir()):
        theirs, ours = (np.asarray(Image.open(tmp_path / name / file.name)).astype(int) for name in ("images", "again"))
        assert np.abs(theirs - ours).max() <= 1
    process = command(tmp_path / "none", config="configs/sdxl.py:tiny")
    assert "there is configs/sdxl.py and configs/sdxl.py:smoke" in process.stderr
