"""Stable Diffusion 3.5 draws what diffusers draws, with value encoders of each kind, and is told what does not fit."""

import json
import shutil

import numpy as np
import pytest
from flax import nnx

from livo_jax import StableDiffusion, sharding, value_encoders
from livo_jax.methods import concept_ablation, uce
from livo_jax.retrieval import first_steps, states
from livo_jax.runs import check
from livo_jax.sampling import conditioning, generate
from livo_jax.sampling.requests import Dose, Request
from livo_jax.value_encoders.shelf import Shelf, Together
from livo_jax.values.principles import text_hash
from tests import kinds
from tests.kinds import OTHER, PROMPTS, VALUE, at_once, channels_first, of_kind
from tests.sd3.conftest import SCHEDULER, SETTINGS


def pipeline_of(theirs, root, t5: bool = True, scheduler="FlowMatchEulerDiscreteScheduler"):
    """diffusers' pipeline of these models."""
    import diffusers
    from transformers import CLIPTokenizer, T5TokenizerFast

    tokenizers = {name: CLIPTokenizer.from_pretrained(root / name) for name in ("tokenizer", "tokenizer_2")}
    tokenizers["tokenizer_3"] = T5TokenizerFast.from_pretrained(root / "tokenizer_3") if t5 else None
    parts = theirs if t5 else theirs | {"text_encoder_3": None}
    kind = getattr(diffusers, scheduler)
    pipeline = diffusers.StableDiffusion3Pipeline(**parts, **tokenizers, scheduler=kind.from_config(SCHEDULER))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    "sampler, negative, t5, scale",
    [("euler", "", True, 3.0), ("heun", "a tailor", True, 1.0), ("euler", "a tailor", False, 3.0)],
)
def test_images_are_the_published_pipelines(sd, without_t5, published, theirs, sampler, negative, t5, scale):
    """Tokens to pixels, against diffusers' StableDiffusion3Pipeline from the same noise."""
    ours = sd if t5 else without_t5
    scheduler = {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler"}[sampler]
    noise = np.stack([generate.initial_noise(5, text_hash(p), 0, sd.latent_shape) for p in PROMPTS])
    expected = pipeline_of(theirs, published, t5, scheduler)(
        PROMPTS, negative_prompt=[negative] * 2 if negative and scale > 1 else None, num_inference_steps=3,
        guidance_scale=scale, latents=channels_first(noise), output_type="np", max_sequence_length=24,
    ).images  # fmt: skip
    requests = [Request(p, negative=negative if scale > 1 else "") for p in PROMPTS]
    images = generate.generate(ours, requests, seed=5, **SETTINGS | {"sampler": sampler, "guidance_scale": scale})
    assert images.shape == (2, 16, 16, 3)
    assert np.abs(images - expected * 255).max() < 1.0, "equal but for rounding to bytes"
    assert np.abs(images[0].astype(int) - images[1]).max() > 1


@pytest.mark.parametrize(
    "kind, pooled, states", [*((kind, False, 1) for kind in value_encoders.KINDS), ("lora", True, 3)]
)
def test_the_exported_pipeline_draws_the_same_images(sd, made, config, published, tmp_path, kind, pooled, states):
    config = of_kind(config, kind, pooled=pooled, states=states)
    value_encoder = kinds.that_moves_pooled(made[kind], config) if pooled else made[kind]
    kinds.assert_export_draws_the_same(sd, value_encoder, config, published, tmp_path / "livo", SETTINGS)
    if pooled:
        with pytest.raises(ValueError, match="reads otherwise:\n  pooled: True there, False in the config"):
            value_encoders.start(
                of_kind(config, kind, pooled=False, start=str(tmp_path / "livo")), sd, sharding.make_mesh()
            )


def test_an_export_of_a_model_without_t5_draws_the_same_images(without_t5, made, config, tmp_path):
    config = config.copy_and_resolve_references()
    config.model, config.sampling.sampler = str(without_t5.root), "heun"
    drawing, without = SETTINGS | {"sampler": "heun"}, dict(text_encoder_3=None, tokenizer_3=None)
    kinds.assert_export_draws_the_same(
        without_t5, made["full"], config, without_t5.root, tmp_path / "livo", drawing, **without
    )


def test_a_shelf_of_values(sd, made, tmp_path):
    """Each is found by the beginning of its text, though T5's is longer."""
    index = {"base": sd.name, "values": {}}
    for name, statement in (("shape", VALUE), ("colour", OTHER)):
        made["token"].save(tmp_path / name, sd.name)
        index["values"][name] = {"statement": statement, "kind": "token", "folder": name}
    (tmp_path / "shelf.json").write_text(json.dumps(index))
    both = sd.generate(["a baker"], [["shape", "colour"]], Shelf(tmp_path, sd), **SETTINGS)
    expected = sd.generate(["a baker"], [[VALUE, OTHER]], made["token"], **SETTINGS)
    assert np.abs(both.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_tokens_of_several_states(sd, config, kind):
    """Those of both CLIPs from the end of the text on, side by side; as it starts, the model's own."""
    ids, D = sd.tokenize([f"{VALUE}, {prompt}" for prompt in PROMPTS]), 44
    ends = (ids[:, 0, :16] == sd.tokenizer.eos_token_id).argmax(axis=1)
    towers = enumerate(sd.text_encoder.towers)
    read = [at_once(tower.__call__, ids[:, k, :16]).last_hidden_state for k, tower in towers]
    hidden = np.concatenate(read, axis=-1)
    for n in (1, 3, 0):
        value_encoder = value_encoders.start(of_kind(config, kind, states=n), sd, sharding.make_mesh())
        tokens = np.asarray(at_once(value_encoder.tokens, ids, sd.text_encoder))
        wanted = [row if n == 0 else row[np.minimum(np.arange(end, end + n), 15)] for row, end in zip(hidden, ends)]
        assert tokens.shape == (2, n or 16, D)
        np.testing.assert_allclose(tokens, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_value_moves_the_pooled_text(sd, config, made, kind):
    """Of each row by the values that it sees."""
    value_encoder = kinds.assert_moves_pooled(sd, made[kind], of_kind(config, kind))
    requests = [Request(p, 0, values) for p, values in zip(PROMPTS, [(Dose(VALUE),), (Dose(VALUE), Dose(OTHER, 0.5))])]
    columns, strengths, _ = conditioning.value_columns(sd, requests, text=value_encoder.text)
    prompts, negative = (sd.tokenize(texts) for texts in (PROMPTS, ["", ""]))
    batch = conditioning.Batch(*[np.zeros(2, np.uint32)] * 4, prompts, negative, strengths, values=columns)

    @nnx.jit
    def read(text_encoder, value_encoder):
        return conditioning.condition(batch, text_encoder, value_encoder).text_embeds

    pooled, plain = (np.asarray(read(sd.text_encoder, it)).reshape(2, 3, -1) for it in (value_encoder, made[kind]))
    ids = columns.value_prompt_ids.reshape(4, *columns.value_prompt_ids.shape[2:])
    first, _, second, other = np.asarray(at_once(value_encoder.pooled_shift, ids, sd.text_encoder))
    wanted = [[first, 0 * first, first], [second, 0 * first, second + other]]
    np.testing.assert_allclose(pooled - plain, wanted, atol=1e-4)


def test_who_else_moves_the_pooled_text(sd, config, made):
    """Of a shelf each value as its encoder does; and the first steps, of which a prompt's own are as before."""
    config = of_kind(config, "full")
    moving = kinds.that_moves_pooled(made["full"], config)
    ids = sd.tokenize([f"{value}, a baker" for value in (VALUE, OTHER)])
    beginnings = np.full((2, ids.shape[-1]), -1, np.int32)
    for row, value in zip(beginnings, (VALUE, OTHER)):
        begin = sd.tokenizer(value)["input_ids"][:-1]
        row[: len(begin)] = begin
    together = Together([moving, made["full"]], [1, 1], beginnings)
    shift = np.asarray(at_once(together.pooled_shift, ids, sd.text_encoder))
    np.testing.assert_allclose(shift[0], at_once(moving.pooled_shift, ids[:1], sd.text_encoder)[0], atol=1e-5)
    assert np.abs(shift[0]).max() > 0.1 and not shift[1].any()

    own, moved = zip(*(first_steps.make_reader(sd, it, (VALUE, OTHER))("a baker") for it in (made["full"], moving)))
    np.testing.assert_allclose(*own, atol=1e-5)
    assert np.abs(moved[0] - moved[1]).min() > 1e-4


def test_the_states_of_a_prompt_are_the_clips(sd, without_t5):
    read = [states.make_reader(model)(PROMPTS) for model in (sd, without_t5)]
    assert read[0].shape == (2, 2 * 44) and np.abs(read[0][0] - read[0][1]).max() > 1e-3
    np.testing.assert_allclose(*read, rtol=1e-5)


def test_no_value_is_the_base(sd, made):
    """And the order of values is of no matter, for text has no positions; strengths are a dial."""
    doses = [(), (Dose(VALUE),), (Dose(VALUE, 1e-6),), (Dose(VALUE), Dose(OTHER)), (Dose(OTHER), Dose(VALUE))]
    requests = [Request("a baker", 0, values) for values in doses]
    images = generate.generate(sd, requests, made["full"], **SETTINGS).astype(int)
    base = generate.generate(sd, requests[:1], **SETTINGS)[0]
    assert [bool(np.abs(image - base).max() > 1) for image in images] == [False, True, False, True, True]
    assert np.abs(images[3] - images[4]).max() <= 1 < np.abs(images[3] - images[1]).max()


def test_what_does_not_fit(sd, made, config, published, tmp_path):
    """Errors name the family, the place and the remedy."""
    assert sd.tokenize(PROMPTS).shape == (2, 3, 24), "two CLIPs of 16 tokens, and T5 of 24"
    with pytest.raises(ValueError, match="prompt_layout='official': choose from padded"):
        generate.generate(sd, [Request("a cook")], prompt_layout="official")
    with pytest.raises(ValueError, match="sampler='pndm': choose from euler, heun, which are of flow matching"):
        generate.generate(sd, [Request("a cook")], sampler="pndm")
    with pytest.raises(ValueError, match="images of 32 x 16: edges must be at most 24"):
        sd.shape_of((32, 16))
    with pytest.raises(ValueError, match="of Stable Diffusion 3 none are read; merge them by diffusers"):
        sd.merge_loras(["style.safetensors"])
    wrong = config.copy_and_resolve_references()
    wrong.loss.min_snr_gamma, wrong.sampling.prompt_layout, wrong.sampling.sampler = 5.0, "official", "ddim"
    with pytest.raises(ValueError, match="(?s)sampler='ddim'.*'official' is not of Stable Diffusion 3.*gamma=5.0"):
        check.check_with_model(wrong, sd, judge=False)
    for kind in (concept_ablation.Update, uce.check_cross_attention):
        arguments = (config, sd, None)[: 3 if kind is concept_ablation.Update else 2]
        with pytest.raises(ValueError, match="changes a UNet's cross-attention, and .* is a Stable Diffusion 3"):
            kind(*arguments)

    made["token"].save(tmp_path / "xl" / "value_encoder", "sdxl-base")  # XL has CLIPs of the same widths
    known = {"livo": {"family": "sdxl", "base": "sdxl-base", "values": [], "dealing": 20}}
    (tmp_path / "xl" / "value_encoder" / "config.json").write_text(json.dumps(known))
    with pytest.raises(ValueError, match="encoder of family 'sdxl', of 'sdxl-base', and .* is of 'sd3' .*: train one"):
        value_encoders.start(of_kind(config, "token", start=str(tmp_path / "xl")), sd, sharding.make_mesh())

    def broken(part, drop="nothing", **changes):
        root = tmp_path / f"broken_{len([*tmp_path.iterdir()])}"
        shutil.copytree(published, root, ignore=shutil.ignore_patterns(drop))
        file = root / (part if part == "model_index.json" else f"{part}/config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return root

    for root, error, message in (
        (broken("vae", "text_encoder_3"), FileNotFoundError, "text_encoder_3/config.json is missing(?s:.*)T5 may be"),
        (broken("vae", "tokenizer_3"), ValueError, "tokenizer_3 has no vocabulary: is tokenizer.json or spiece"),
        (broken("model_index.json", _class_name="StableDiffusionPipeline"), FileNotFoundError,
         "unet/config.json is missing\nIts model_index.json calls it a StableDiffusionPipeline"),
        (broken("model_index.json", vae=7), ValueError, r"vae=7: \[library, class\] is wanted"),
        (broken("model_index.json", max_sequence_length=0), ValueError, "its T5 reads max_sequence_length=0 tokens"),
        (broken("vae", scaling_factor=0.0), ValueError, "scaling_factor=0.0, .*: finite numbers are wanted"),
        (broken("vae", "transformer"), FileNotFoundError, "transformer/config.json is missing\nIts .*Diffusion3Pipe"),
        (broken("model_index.json", max_sequence_length=-1), ValueError, "max_sequence_length=-1: 0 or more tokens"),
        (broken("transformer", joint_attention_dim=40), ValueError,
         "is no text-to-image Stable Diffusion 3: its CLIPs are 44 wide, .* takes 40 at most; its T5 is 48 wide"),
        (broken("transformer", pooled_projection_dim=7), ValueError, "pooled text is 16 wide, its transformer wants 7"),
        (broken("vae", latent_channels=4), ValueError, "its VAE has 4 latent channels, its transformer 6 in and 6 out"),
        (broken("transformer", sample_size=9), ValueError, "sample_size=9: it must be a multiple of 2, at most 12"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            StableDiffusion.from_pretrained(root)
    root = broken("vae")
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    with pytest.raises(ValueError, match="'DDIMScheduler' is no flow matching: choose from FlowMatchEuler"):
        StableDiffusion.from_pretrained(root)
