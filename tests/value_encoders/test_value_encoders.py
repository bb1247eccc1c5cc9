"""Value encoders of each kind: gradients are PyTorch's, files are peft's, and all else works with each."""

import copy
import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from configs import tiny
from livo_jax import StableDiffusion, ValueEncoder, methods, sharding, value_encoders
from livo_jax.export import export
from livo_jax.models.weights import split, to_published
from livo_jax.runs import plan, restore, train
from livo_jax.sampling import conditioning, generate
from livo_jax.sampling.requests import Dose, Request
from livo_jax.training.batch import Batch
from livo_jax.training.objective import make_loss, split_models
from livo_jax.training.step import init_state, make_train_step
from livo_jax.value_encoders.base import check_value_encoder
from livo_jax.value_encoders.gates import Gate
from livo_jax.value_encoders.lora import LoRA
from livo_jax.value_encoders.soft_tokens import SoftTokens
from livo_jax.values.principles import text_hash
from tests import small_run
from tests.kinds import assert_export_draws_the_same, at_once, of_kind
from tests.training.test_train import CONFIG, torch_step

STATEMENTS = ("shape equality", "colour equality")
PROMPTS = [f"a photo of a {word}" for word in ("baker", "cook", "smith", "tailor")]
SETTINGS = dict(steps=2, guidance_scale=3.0, batch_size=1, mesh=sharding.make_mesh(1))


@pytest.fixture(scope="module")
def config(published):
    config = tiny.get_config()
    config.model, config.principles = str(published), ("shape", "colour")
    config.data.attributes = 0.0
    config.value_encoder.rank, config.value_encoder.alpha, config.value_encoder.tokens = 3, 6.0, 2
    config.sampling.sampler, config.sampling.steps = "dpmsolver++", 2
    return config


def trained(value_encoder):
    """As after some training: no weight where it started."""
    graph, params = split(value_encoder)
    rng = np.random.default_rng(0)
    return nnx.merge(graph, jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32), params))


@pytest.fixture(scope="module")
def made(sd, config):
    """kind -> a trained value encoder of it."""

    def start(kind):
        return trained(value_encoders.start(of_kind(config, kind), sd, sharding.make_mesh()))

    return {kind: start(kind) for kind in value_encoders.KINDS}


@pytest.fixture(scope="module")
def ids(sd):
    return sd.tokenize([f"{statement}, {prompt}" for statement, prompt in zip(2 * STATEMENTS, PROMPTS)])


@pytest.fixture(scope="module")
def step(sd, ids):
    """step(value encoder) -> gradients by parameter, the loss, and the batch that they are of."""
    rng = np.random.default_rng(0)
    images = {side: rng.uniform(-1, 1, (len(ids), 16, 16, 3)).astype(np.float32) for side in ("aligned", "violating")}
    batch = Batch(ids, prompt_ids=sd.tokenize(PROMPTS), **images)

    def step(value_encoder):
        networks, params, frozen = split_models(sd, value_encoder, with_vae=True)
        tx = optax.trace(0.0)  # its state is the gradient
        run = jax.jit(make_train_step(networks, tx, CONFIG, make_loss(networks, CONFIG)))
        state, metrics = run(init_state(params, tx), frozen, batch)
        return state["opt_state"].trace, float(metrics["loss"]), batch

    return step


def same_gradients(ours: dict, theirs: dict):
    assert ours.keys() == theirs.keys()
    largest = max(np.abs(gradient).max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert np.abs(ours[name] - gradient).max() < 1e-3 * largest, name
        assert np.abs(gradient).max() > 1e-4 * largest or "k_proj" in name, name


def test_lora_starts_as_the_text_encoder(sd, config, ids):
    lora = value_encoders.start(of_kind(config, "lora"), sd, sharding.make_mesh())
    tokens, text = at_once(lora.tokens, ids, sd.text_encoder), at_once(sd.text_encoder.__call__, ids)
    np.testing.assert_allclose(tokens[:, 0], text.pooled, atol=1e-6)
    graph, params = split(sd.text_encoder)
    half = nnx.merge(graph, optax.tree.cast(params, jnp.bfloat16))
    assert at_once(lora.tokens, ids, half).dtype == jnp.float32


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft, of transformers
def test_lora_is_pefts(sd, made, config, ids, torch_models, step, tmp_path):
    """The same outputs, loss and gradients as the adapter in peft, which reads it; what peft saves we read."""
    from peft import PeftModel

    made["lora"].save(tmp_path / "ours", config.model)
    theirs = PeftModel.from_pretrained(
        copy.deepcopy(torch_models["text_encoder"]), tmp_path / "ours", is_trainable=True
    ).eval()
    with torch.no_grad():
        pooled = theirs(torch.tensor(ids)).pooler_output
    ours = at_once(made["lora"].tokens, ids, sd.text_encoder)[:, 0]
    np.testing.assert_allclose(ours, pooled, atol=1e-5)
    assert np.abs(ours - at_once(sd.text_encoder.__call__, ids).pooled).max() > 0.05

    gradients, loss, batch = step(made["lora"])
    expected, _ = torch_step(torch_models, theirs, batch, CONFIG, sd.scheduler_config)
    assert loss == pytest.approx(expected, rel=1e-4)

    def name(name):
        return name.removeprefix("base_model.model.").replace(".default", "")

    grads = {name(n): p.grad.numpy() for n, p in theirs.named_parameters() if p.requires_grad}
    same_gradients(to_published(gradients["updates"]), grads)

    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    again = LoRA.from_pretrained(tmp_path / "theirs", sd)
    jax.tree.map(np.testing.assert_array_equal, split(again)[1], split(made["lora"])[1])
    assert (again.rank, again.alpha, again.targets) == (3, 6.0, tuple(sorted(LoRA.TARGETS)))


def test_soft_tokens_have_pytorchs_gradients(sd, config, torch_models, step):
    tokens = trained(value_encoders.start(of_kind(config, "token", tokens=1), sd, sharding.make_mesh()))
    table = torch.tensor(np.asarray(tokens.table[...])[:, 0], requires_grad=True)
    gradients, loss, batch = step(tokens)

    def theirs(ids):
        return SimpleNamespace(pooler_output=table[torch.tensor([0, 1, 0, 1])])

    expected, _ = torch_step(torch_models, theirs, batch, CONFIG, sd.scheduler_config)
    assert loss == pytest.approx(expected, rel=1e-4)
    same_gradients({"table": np.asarray(gradients["table"])[:, 0]}, {"table": table.grad.numpy()})


def test_soft_tokens_know_their_value_by_its_words(sd, config):
    """By the longest statement that the ids begin with. They start from its states, the pooled one first."""
    mesh = sharding.make_mesh()
    tokens = value_encoders.start(of_kind(config, "token"), sd, mesh)
    start = np.asarray(tokens.table[...])
    statements = sd.tokenize(STATEMENTS)
    np.testing.assert_allclose(start[:, 0], at_once(sd.text_encoder.__call__, statements).pooled, atol=1e-5)
    assert np.abs(start[:, 0] - start[:, 1]).min(axis=1).max() > 0, "equal tokens would stay equal"
    texts = ["Colour  equality, a cook", "shape equality, colour equality, a cook", "shape equality, "]
    np.testing.assert_array_equal(tokens.tokens(sd.tokenize(texts)), start[[1, 0, 0]])
    longer = SoftTokens(tokens.config, statements=("shape", "shape, colour"), tokenizer=sd.tokenizer, count=1)
    longer.table[...] = jnp.arange(2.0)[:, None, None] * jnp.ones_like(longer.table[...])
    found = longer.tokens(sd.tokenize(["shape, a cook", "shape, colour, a cook"]))
    assert found[:, 0, 0].tolist() == [0.0, 1.0]
    config = of_kind(config, "token")
    config.data.attributes = 0.4
    named = value_encoders.make(config, sd)  # "shape equality: round" has tokens of its own, too
    named.table[...] = jnp.arange(9.0)[:, None, None] * jnp.ones_like(named.table[...])
    found = named.tokens(sd.tokenize([f"{statement}, a cook" for statement in named.statements]))
    assert found[:, 0, 0].tolist() == list(range(9))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_tokens_of_several_states(sd, config, kind, ids):
    def start(**settings):
        return value_encoders.start(of_kind(config, kind, **settings), sd, sharding.make_mesh())

    states, L = at_once(sd.text_encoder.__call__, ids).last_hidden_state, ids.shape[1]
    ends = (ids == sd.tokenizer.eos_token_id).argmax(axis=1)
    for n in (1, 3, 0):
        tokens = np.asarray(at_once(start(states=n).tokens, ids, sd.text_encoder))
        for row, end, found in zip(states, ends, tokens):
            wanted = row if n == 0 else row[np.minimum(np.arange(end, end + n), L - 1)]
            np.testing.assert_allclose(found, wanted, atol=1e-5)
    for n in (-1, L + 1):
        with pytest.raises(ValueError, match=rf"config.value_encoder.states={n}: choose 0 \(all\) to {L}"):
            start(states=n)
    with pytest.raises(ValueError, match="value_encoder.pooled=True: models of one text encoder read no pooled text"):
        start(pooled=True)


def test_a_value_encoder_of_the_value_alone(sd, config, tmp_path):
    alone = of_kind(config, "full", reads_prompt=False, states=3)
    value_encoder = trained(value_encoders.start(alone, sd, sharding.make_mesh()))
    requests = [Request(prompt, 0, (Dose("shape equality"),)) for prompt in PROMPTS]
    columns, *_ = conditioning.value_columns(sd, requests, text=value_encoder.text)
    assert (columns.value_prompt_ids == sd.tokenize(["shape equality, "])).all()
    method = methods.make_method(alone)
    settings = method.make_drawing(method.models(sd, value_encoder), None, tmp_path, None).settings
    assert settings == {"method": "value tokens", "states": 3, "reads_prompt": False}, "other images than the default's"
    images = generate.generate(sd, requests, value_encoder, seed=0, **SETTINGS)
    plain = generate.generate(sd, [r._replace(values=()) for r in requests], seed=0, **SETTINGS)
    assert all((a != b).any() for a, b in zip(images, plain))


@pytest.mark.parametrize("kind, states", [("full", 3), ("lora", 0)])
def test_an_export_of_several_states_of_the_value_alone(sd, config, tmp_path, kind, states):
    """Its pipeline draws the same images; it is read as it was trained, and not otherwise."""
    config = of_kind(config, kind, states=states, reads_prompt=False)
    value_encoder = trained(value_encoders.start(config, sd, sharding.make_mesh()))
    drawing = dict(SETTINGS, guidance_scale=config.sampling.guidance_scale)
    assert_export_draws_the_same(
        sd, value_encoder, config, config.model, tmp_path / "export", drawing, safety_checker=None
    )
    told = (
        f"reads otherwise:\n  states: {states} there, 1 in the config\n  reads_prompt: False there, True in the config"
    )
    with pytest.raises(ValueError, match=told):
        start = of_kind(config, kind, states=1, reads_prompt=True, start=str(tmp_path / "export"))
        value_encoders.start(start, sd, sharding.make_mesh())


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_some_values_may_be_read_alone(sd, config, tmp_path, kind):
    alone = of_kind(config, kind, alone=("harm",))
    alone.principles = ("shape", "bloody")
    value_encoder = trained(value_encoders.start(alone, sd, sharding.make_mesh()))
    bloody = "bloody considered inappropriate"
    assert value_encoder.text(bloody, "a cook") == f"{bloody}, "
    assert value_encoder.text("shape equality: round", "a cook") == "shape equality: round, a cook"
    export.export(tmp_path / "export", sd, value_encoder, alone)
    read_back = value_encoders.KINDS[kind].from_pretrained(tmp_path / "export", sd=sd)
    assert read_back.alone == (bloody,), "or its token would be of texts that it was not trained with"
    check_value_encoder(sd, read_back, ["shape equality", "shape equality: round", bloody])
    with pytest.warns(UserWarning, match="'shap': .* was not trained with that.* with 'shape equality', 'bloody cons"):
        check_value_encoder(sd, read_back, ["shap", bloody])
    with pytest.raises(ValueError, match=r"config.value_encoder.alone=\('gore',\): choose from 'bias', 'harm'"):
        value_encoders.start(of_kind(config, kind, alone=("gore",)), sd, sharding.make_mesh())


@pytest.mark.parametrize("kind", ["lora", "token"])
def test_several_values_and_strengths(sd, made, kind):
    """Each image is what it is alone, and what has no value is the base's."""
    first, second = (Dose(statement) for statement in STATEMENTS)
    rows = [(), (first,), (first, second), (first._replace(strength=0.5),)]
    requests = [Request("a baker", 0, doses) for doses in rows]
    settings = SETTINGS | {"batch_size": 4, "guidance_scale": 15.0}
    draw = functools.partial(generate.generate, sd, **settings)
    images = draw(requests, made[kind]).astype(int)
    assert np.abs(images[0] - draw(requests[:1])[0]).max() <= 1
    assert np.abs(images[1] - draw(requests[1:2], made[kind])[0]).max() <= 1
    assert min(np.abs(images[i] - images[j]).max() for i in range(4) for j in range(i)) > 1
    if kind == "lora":
        divided = draw(requests, made[kind], mesh=sharding.make_mesh(2), batch_size=2)
        assert np.abs(images - divided).max() <= 1, "on two devices"


@pytest.mark.parametrize("kind", ["lora", "token"])
def test_the_pipeline_draws_the_same_images(sd, made, config, kind, tmp_path):
    from diffusers import DiffusionPipeline

    export.export(tmp_path / "out", sd, made[kind], of_kind(config, kind))
    pipeline = DiffusionPipeline.from_pretrained(
        sd.root, custom_pipeline=str(tmp_path / "out"), trust_remote_code=True, safety_checker=None
    )
    prompts, values, seed = PROMPTS[:3], [list(STATEMENTS), STATEMENTS[1], None], 7
    noise = np.stack([generate.initial_noise(seed, text_hash(prompt), 0, sd.latent_shape) for prompt in prompts])
    latents = torch.tensor(np.moveaxis(noise, -1, 1))
    settings = dict(strength={STATEMENTS[1]: 0.5}, seed=seed, guidance_scale=3.0)
    theirs = pipeline(prompts, values, latents=latents, output_type="np", **settings).images
    ours = sd.generate(prompts, values, made[kind], steps=2, batch_size=3, mesh=sharding.make_mesh(1), **settings)
    assert np.abs(ours - theirs * 255).max() < 1.0
    if kind == "token":
        with pytest.raises(ValueError, match="knows shape equality, colour equality, not gender equality"):
            pipeline(prompts, "gender equality", latents=latents)


@pytest.mark.parametrize("kind", ["lora", "token"])
def test_an_export_is_read_again(sd, made, config, kind, tmp_path):
    """Bit for bit, by the kind that wrote it, with its gates; the merged weights are a value encoder of kind full."""
    config, out = of_kind(config, kind, start=str(tmp_path / "out")), tmp_path / "out"
    made[kind].gates = ((STATEMENTS[0], Gate((0.0, 999.0), (0.25, 0.5))),)
    export.export(out, sd, made[kind], config)
    assert f"ve = {type(made[kind]).__name__}.from_pretrained(HERE, sd=sd)" in (out / "README.md").read_text()
    if kind == "lora":  # each layer named alone, as diffusers and peft leave what they loaded
        file = out / "adapter" / "adapter_config.json"
        named = json.loads(file.read_text())
        named["target_modules"] = [f"layers.{i}.{name}" for i in range(2) for name in named["target_modules"]]
        file.write_text(json.dumps(named))
    again = value_encoders.start(config, sd, sharding.make_mesh())
    jax.tree.map(np.testing.assert_array_equal, split(again)[1], split(made[kind])[1])
    assert again.gates == made[kind].gates
    if kind == "lora":
        ids = sd.tokenize(PROMPTS)
        merged = ValueEncoder.from_pretrained(out)(ids).pooled
        np.testing.assert_allclose(merged, made[kind].tokens(ids, sd.text_encoder)[:, 0], atol=1e-6)
    else:
        with pytest.raises(FileNotFoundError, match="start holds no 'full' value encoder"):
            value_encoders.start(of_kind(config, "full"), sd, sharding.make_mesh())
        with pytest.raises(ValueError, match="knows shape equality, colour equality, not gender equality"):
            generate.generate(sd, [Request("a cook", 0, (Dose("gender equality"),))], again, **SETTINGS)


@pytest.mark.parametrize("kind", ["lora", "token"])
def test_a_run_trains_its_kind_alone(root, tmp_path, kind):
    """A run on two devices, read on one: what it wrote is read, and another kind or rank is refused.

    That of lora beside a model of 8 bits. What it started from was moved, and is not looked at.
    """
    config = tiny.get_config("smoke")
    config.model, config.random_weights, config.data.directory = str(root / "model"), True, str(root / "pairs")
    config.principles, config.judge = ("shape", "colour"), ""
    config.eval.seen, config.eval.held_out = ("cook",), ("baker",)
    config.sampling.steps, config.sampling.batch_size = 2, 2
    config.mesh = dict(data=1, fsdp=2, tensor=1)
    config.train.steps, config.train.warmup_steps, config.data.cache = 3, 0, False
    config.log.samples_every = 0
    config.value_encoder.update(kind=kind)
    config.quantised = {"lora": "int8", "token": ""}[kind]
    config.train.ema_decay = 0.5
    train.train_and_evaluate(config, tmp_path)
    assert not (tmp_path / "samples").exists()
    config.mesh = dict(data=1, fsdp=1, tensor=1)
    written = json.loads((tmp_path / "config.json").read_text())
    written["value_encoder"]["start"] = str(tmp_path / "before" / "export")
    (tmp_path / "config.json").write_text(json.dumps(written))
    config.value_encoder.start = str(tmp_path / "export")
    (tmp_path / "export").mkdir()
    _, sd, value_encoder = restore.restore_run(config, tmp_path, sharding.make_mesh(1))
    config.value_encoder.start = ""
    arrays = small_run.final(tmp_path)
    assert sd.quantised == config.quantised and sd.unet.conv_in.kernel.dtype == ("int8" if sd.quantised else "float32")

    def of(name):
        return {k.removeprefix(f"['{name}']"): x for k, x in arrays.items() if k.startswith(f"['{name}']")}

    restored = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(split(value_encoder)[1])}
    assert restored.keys() == of("ema").keys() and all(np.array_equal(x, of("ema")[k]) for k, x in restored.items())
    assert any((x != of("params")[k]).any() for k, x in restored.items()), "the average is used, not the last"
    start = value_encoders.start(config, sd, sharding.make_mesh(1))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), split(value_encoder)[1], split(start)[1])
    assert all(jax.tree.leaves(moved))
    parameters = plan.plan(config, 1)["parameters"]["trained"]
    assert parameters == sum(x.size for x in jax.tree.leaves(split(value_encoder)[1]))
    config.value_encoder.update(rank=2, tokens=3)
    with pytest.raises(ValueError, match="holds another value encoder(.|\n)*value_encoder.rank: 8 there, 2 now"):
        restore.restore_run(config, tmp_path, sharding.make_mesh(1))


def test_what_does_not_fit(sd, small, made, config, tmp_path):
    mesh = sharding.make_mesh()

    def start(kind, **settings):
        return value_encoders.start(of_kind(config, kind, **settings), sd, mesh)

    with pytest.raises(ValueError, match="kind='half': choose from full, lora, token"):
        start("half")
    with pytest.raises(ValueError, match="(?s)target 'to_q': choose from q_proj.*rank=0, alpha=6.0, 1 targets"):
        start("lora", rank=0, targets=("to_q",))
    with pytest.raises(ValueError, match="tokens=30: the model has room for 1[0-9] after a statement"):
        start("token", tokens=30)
    with pytest.raises(ValueError, match="0 soft tokens of 2 values"):
        start("token", tokens=0)

    place = tmp_path / "adapter"
    made["lora"].save(place, "the-base")
    of_another = pytest.warns(UserWarning, match="was trained on 'the-base' and is used on")
    with of_another, pytest.raises(ValueError, match="is another:\n  rank: 3 there, 4 in the config"):
        start("lora", start=str(place), rank=4)
    with pytest.raises(FileNotFoundError, match="start holds no 'token' value encoder: .*has no value_tokens"):
        start("token", start=str(place))
    with pytest.raises(FileNotFoundError, match="start holds no 'lora' value encoder: .*adapter_config.json"):
        start("lora", start=str(sd.root / "text_encoder"))
    settings = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True, "bias": "all"}))
    with pytest.raises(ValueError, match="adapter_config.json: not supported: use_dora=True, .* bias='all'"):
        start("lora", start=str(place))
    for wrong, told in (
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora', which changes the base's weights too"),
        ({"a_field_of_tomorrow": 1}, "a_field_of_tomorrow=1"), ({"r": None}, "r=None, lora_alpha="),
        ({"lora_alpha": "8"}, "lora_alpha='8': these are numbers"), ({"target_modules": [1]}, "target_modules=.1."),
    ):  # fmt: skip
        (place / "adapter_config.json").write_text(json.dumps(settings | wrong))
        with pytest.raises(ValueError, match=f"adapter_config.json: not supported: .*{told}"):
            start("lora", start=str(place))

    # One text encoder has fewer layers, the embedded world's is wider.
    other = StableDiffusion.from_pretrained(tiny.get_config().model)
    (place / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="(?s)an adapter of 'the-base', does not fit .*shapeworld_model.*q_proj"):
        LoRA.from_pretrained(place, other)
    with pytest.raises(ValueError, match="(?s)an adapter of 'the-base', does not fit .*layers.1"):
        LoRA.from_pretrained(place, small[0])
    made["token"].save(place, "the-base")
    with pytest.raises(ValueError, match="of 'the-base', has tokens of width 20; those of .*shapeworld_model are 64"):
        SoftTokens.from_pretrained(place, other)
    for kind in ("lora", "token"):
        with pytest.raises(ValueError, match="made for another model:\n  hidden_size: 20 in the value encoder, 64 in"):
            generate.generate(other, [Request("a cook", 0, (Dose(STATEMENTS[0]),))], made[kind], **SETTINGS)
