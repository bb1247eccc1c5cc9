"""Methods that train the UNet: Diffusion-DPO on low-rank updates, Concept Ablation."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from livo_jax import methods, sharding, values
from livo_jax.data.batches import batches
from livo_jax.data.preferences import Block, Preferences
from livo_jax.models.weights import split, to_published
from livo_jax.runs import check, plan, restore, train
from livo_jax.sampling.requests import Dose, Request
from livo_jax.training import losses
from livo_jax.training.batch import Batch, draw_noise
from livo_jax.training.objective import add_noise
from tests import small_run
from tests.data import test_data


def config_of(name):
    config = importlib.import_module(f"configs.baselines.{name}").get_config("tiny:smoke")
    config.data.cache = False
    return config


@pytest.fixture(scope="module")
def sd(small):
    return small[0]


@pytest.fixture(scope="module")
def batch(sd):
    rng = np.random.default_rng(0)

    def image():
        return rng.uniform(-1, 1, (2, sd.image_size, sd.image_size, 3)).astype(np.float32)

    return Batch(
        value_prompt_ids=sd.tokenize(["a bloody baker", "a photo of a cook on a bloody day"]),
        prompt_ids=sd.tokenize(["a baker", "a photo of a cook"]),
        aligned=image(),
        violating=image(),
    )


@pytest.fixture(scope="module")
def noise(sd):
    return draw_noise(jax.random.key(0), (2, *sd.latent_shape), (0, 1000))


@pytest.fixture(scope="module")
def parts(small):
    _, networks, frozen, _ = small
    return networks, frozen


def loss_of(config, sd, parts, noise):
    """The method's untrained Update, and its jitted loss with gradients."""
    method, (networks, frozen) = methods.make_method(config), parts
    update = method.Update(config, sd, nnx.Rngs(config.seed))
    graph, params = split(update)
    loss = method.make_loss(networks._replace(graphs=networks.graphs | {"trained": graph}))
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def gradient_of(params, batch):
        return gradient(params, frozen, batch, noise)  # as constants they would be folded

    return update, params, gradient_of


def changed(ours, theirs) -> set[str]:
    """The names of weights in which a UNet differs from another; of an update beside a weight that weight's name."""
    ours, theirs = (to_published(split(module)[1]) for module in (ours, theirs))
    moved = {name.replace("lora_B.", "") for name, x in ours.items() if "lora_B" in name and x.any()}
    return moved | {name for name in theirs if not np.array_equal(ours[name], theirs[name])}


def test_dpo_starts_at_the_reference_and_updates_all_attention(sd, parts, batch, noise):
    update, params, gradient = loss_of(config_of("dpo_unet"), sd, parts, noise)
    assert not changed(update.applied(sd.unet), sd.unet)
    (loss, metrics), grads = gradient(params, batch)
    # Rounding of the errors, about 1e-7 each, times the slope, beta T = 200.
    assert loss == pytest.approx(np.log(2), abs=1e-4) and metrics["margin_w"] == pytest.approx(0, abs=1e-6)
    for layer, part in grads["updates"].items():
        assert not part["lora_A"]["kernel"].any() and part["lora_B"]["kernel"].any(), layer
    params = jax.tree.map(lambda p, g: p - 1e-3 * g / optax.tree.norm(grads), params, grads)
    assert gradient(params, batch)[0][0] < loss
    for part in update.updates.values():
        part["lora_B"].kernel[...] = jnp.ones_like(part["lora_B"].kernel[...])
    attention = {name for name in to_published(split(sd.unet)[1]) if ".to_" in name and name.endswith("weight")}
    assert changed(update.applied(sd.unet), sd.unet) == attention


def test_ablation_leads_the_concept_to_its_anchor_by_keys_and_values(sd, parts, batch, noise):
    config = config_of("concept_ablation")
    config.concept_ablation.prior = 0.0
    batch = batch._replace(violating=None)  # which it does not ask for
    update, params, gradient = loss_of(config, sd, parts, noise)
    assert not changed(update.applied(sd.unet), sd.unet)
    same = batch._replace(value_prompt_ids=batch.prompt_ids)
    (loss, _), grads = gradient(params, same)
    assert max(loss, optax.tree.norm(grads)) < 1e-6, "an anchor asks for nothing: what it predicts stays"
    first = gradient(params, batch)[0][0]
    tx = optax.adam(1e-2)
    state = tx.init(params)
    for _ in range(8):
        updates, state = tx.update(gradient(params, batch)[1], state)
        params = optax.apply_updates(params, updates)
    assert gradient(params, batch)[0][0] < 0.7 * first
    for kernel in update.kernels.values():
        kernel[...] = kernel[...] + 1
    assert all(".attn2.to_k." in name or ".attn2.to_v." in name for name in changed(update.applied(sd.unet), sd.unet))


def test_ablation_keeps_what_its_anchors_show(sd, parts, batch, noise):
    config = config_of("concept_ablation")
    config.concept_ablation.prior = 2.0
    _, params, gradient = loss_of(config, sd, parts, noise)
    (loss, metrics), _ = gradient(params, batch)
    assert float(loss) == pytest.approx(float(metrics["ablation"] + 2 * metrics["kept"]), rel=1e-5)
    z_t, t, target = add_noise(*parts, batch, noise, ("aligned",))
    predicted = sd.unet(z_t, t, sd.text_encoder(batch.prompt_ids).last_hidden_state)
    assert float(metrics["kept"]) == pytest.approx(float(losses.denoising_error(predicted, target).mean()), rel=1e-4)
    same = batch._replace(value_prompt_ids=batch.prompt_ids)
    assert optax.tree.norm(gradient(params, same)[1]) > 1e-3, "what holds an anchor where it is"


def test_prompts_of_a_harm_are_concepts_and_those_without_it_anchors(tmp_path):
    """A harm's pairs lose its wording, a bias's get one."""
    harm, bias = "bloody considered inappropriate", "shape equality"
    prompts = [(harm, "a photo of an ugly bloody cook"), (harm, "a cook on a bloody day"), (bias, "the cook at work")]
    picture = test_data.png(np.zeros((32, 32, 3), np.uint8))
    pair = dict(scene="cook", aligned=picture, violating=picture, provenance="")
    blocks = [Block(harm, "cook", 0, 2), Block(bias, "cook", 2, 1)]
    test_data.write([pair | dict(value=v, prompt=p) for v, p in prompts], blocks, tmp_path / "pairs")
    texts = []

    def tokenize(given):
        return np.array([[texts.append(given[0]) or len(texts) - 1]])

    rows = batches(
        Preferences(tmp_path / "pairs"), tokenize, batch_size=8, image_size=32, random_flip=False, seed=0,
        principles=values.load(("shape", "bloody")), concepts=True,
    )  # fmt: skip
    read = [next(rows) for _ in range(4)]
    ids = (np.concatenate([getattr(row, name).ravel() for row in read]) for name in ("value_prompt_ids", "prompt_ids"))
    found = {(texts[concept], texts[anchor]) for concept, anchor in zip(*ids)}
    assert found == {
        ("a photo of an ugly bloody cook", "a photo of an ugly cook"),
        ("a cook on a bloody day", "a cook"),
        ("the bloody cook at work", "the cook at work"),
        ("the cook on a bloody day at work", "the cook at work"),
    }


@pytest.mark.parametrize("name", ["concept_ablation", "dpo_unet"])
def test_a_run_trains_the_unet_alone_and_is_restored(name, root, tmp_path):
    config = config_of(name)
    config.model, config.random_weights, config.judge = str(root / "model"), True, ""
    config.data.directory, config.log.samples_every = str(root / "pairs"), 4
    config.principles, config.eval.seen, config.eval.held_out = ("shape", "colour"), ("cook",), ("baker",)
    if name == "concept_ablation":
        test_data.make(tmp_path / "pairs", values=("shape equality", "bloody considered inappropriate"))
        config.data.directory, config.principles = str(tmp_path / "pairs"), ("shape", "bloody")
    config.mesh.data, config.mesh.fsdp = 1, 2
    config.sampling.gated = True  # as a config file has it for tokens: nothing here reads it
    config.train.steps, config.sampling.batch_size, config.sampling.steps = 2, 4, 2
    train.train_and_evaluate(config, tmp_path / "run")
    mesh = sharding.make_mesh(**config.mesh)
    models = restore.restore_run(config, tmp_path / "run", mesh)
    base, sd, value_encoder = models
    assert value_encoder is None
    kinds = (".attn2.to_k.", ".attn2.to_v.") if name == "concept_ablation" else (".to_",)
    names = changed(sd.unet, base.unet)
    assert names and all(any(kind in name for kind in kinds) for name in names)
    assert not changed(sd.text_encoder, base.text_encoder) and (tmp_path / "run/samples/step_2.png").exists()
    method = methods.make_method(config)
    drawing = method.make_drawing(models, mesh, tmp_path, None)
    assert method.KINDS == (("harm",) if name == "concept_ablation" else ("bias", "harm"))
    assert drawing.trained == sum(x.size for x in small_run.final(tmp_path / "run").values() if x.ndim) // 3, (
        "Adam's two"
    )
    config.shard_frozen = True
    planned = plan.plan(config, 4)
    assert planned["parameters"]["trained"] == drawing.trained and planned["traffic"].keys() == {
        "gradient",
        "frozen weights",
    }
    request = [Request("a bloody cook", 0, (Dose("bloody considered inappropriate"),))]
    assert (drawing.draw(request) != methods.base(config, base, mesh).draw(request)).any()


def test_what_ablation_cannot_work_with_is_told_at_once():
    config = config_of("concept_ablation")
    config.principles, config.data.cache = ("shape",), True
    with pytest.raises(ValueError) as error:
        check.check_config(config, sharding.make_mesh(**config.mesh))
    assert "concept_ablation is for values of kind harm" in str(error.value)
    assert "config.data.cache=True: the anchor prompts" in str(error.value)
