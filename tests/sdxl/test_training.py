"""A step of Stable Diffusion XL computes what PyTorch does; other methods take it, and runs from start to end."""

import copy
import dataclasses
import functools
import importlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from PIL import Image

from livo_jax import methods, sharding, value_encoders, values
from livo_jax.export import export
from livo_jax.methods import uce
from livo_jax.models.weights import split, to_published
from livo_jax.runs import restore, train
from livo_jax.sampling import pairs
from livo_jax.sampling.requests import Dose, Request
from livo_jax.training.batch import Batch, draw_noise
from livo_jax.training.objective import make_loss, split_models
from livo_jax.training.optimizer import but_embeddings, make_optimizer
from livo_jax.training.step import init_state, make_train_step
from tests import small_run
from tests.data import test_data
from tests.kinds import PROMPTS, VALUE, at_once, of_kind
from tests.runs.test_run import run
from tests.sdxl.conftest import SETTINGS, Towers
from tests.training.test_train import CONFIG, torch_step


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
    text = at_once(sd.text_encoder.__call__, batch.prompt_ids)
    aligned, violating = (jnp.concatenate(at_once(sd.vae.encode, x), -1) for x in (batch.aligned, batch.violating))
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
    _, sd, value_encoder = restore.restore_run(config, tmp_path / "cache", mesh)
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
@pytest.mark.parametrize("name", ["sdxl", "sd35"])
def test_the_command_line_from_pairs_to_an_export(name, tmp_path):
    """A smoke that anyone can run: pairs, cache, two steps, evaluation, images, export and back."""
    command = functools.partial(run, config=f"configs/{name}.py:smoke")

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
    process = command(tmp_path / "none", config=f"configs/{name}.py:tiny")
    assert f"there is configs/{name}.py and configs/{name}.py:smoke" in process.stderr
