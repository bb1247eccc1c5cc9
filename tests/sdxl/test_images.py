"""Stable Diffusion XL draws what diffusers draws, with value encoders of each kind, and is told what does not fit."""

import copy
import json
import math
import pathlib
import shutil

import jax
import numpy as np
import pytest
import torch

from livo_jax import StableDiffusion, ValueEncoder, sharding, value_encoders
from livo_jax.export.export import SCHEDULERS
from livo_jax.files.modules import PARTS, skeleton
from livo_jax.files.repositories import read_json
from livo_jax.models.weights import TO_PUBLISHED, published_name
from livo_jax.runs import restore
from livo_jax.sampling import generate
from livo_jax.sampling.requests import Dose, Request
from livo_jax.value_encoders.lora import LoRA
from livo_jax.value_encoders.shelf import Shelf
from livo_jax.value_encoders.soft_tokens import SoftTokens
from livo_jax.values.principles import text_hash
from tests import kinds
from tests.kinds import OTHER, PROMPTS, VALUE, of_kind
from tests.sampling.test_generate import feed_step_noise
from tests.sdxl.conftest import SCHEDULER, SETTINGS, Towers


@pytest.mark.parametrize(
    "sampler, negative, zeros, scale",
    [
        ("euler", "", True, 3.0),
        ("euler", "", False, 3.0),
        ("dpmsolver++", "a tailor", True, 3.0),
        ("euler_ancestral", "", True, 1.0),
    ],
)
def test_images_are_the_published_pipelines(sd, published, theirs, monkeypatch, sampler, negative, zeros, scale):
    """Tokens to pixels, against diffusers' StableDiffusionXLPipeline from the same noise."""
    import diffusers
    from transformers import CLIPTokenizer

    scheduler, options = SCHEDULERS[sampler]
    feed_step_noise(monkeypatch, scheduler, 5, PROMPTS, sd.latent_shape)
    pipeline = diffusers.StableDiffusionXLPipeline(
        **theirs, **{name: CLIPTokenizer.from_pretrained(published / name) for name in ("tokenizer", "tokenizer_2")},
        scheduler=getattr(diffusers, scheduler).from_config(SCHEDULER, **options), force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    noise = np.stack([generate.initial_noise(5, text_hash(p), 0, sd.latent_shape) for p in PROMPTS])
    expected = pipeline(
        PROMPTS, negative_prompt=[negative] * 2 if negative else None, num_inference_steps=3, guidance_scale=scale,
        latents=torch.tensor(noise.transpose(0, 3, 1, 2)), output_type="np",
    ).images  # fmt: skip
    monkeypatch.setattr(sd, "zeros_for_empty_prompt", zeros)
    requests = [Request(p, negative=negative) for p in PROMPTS]
    ours = generate.generate(sd, requests, seed=5, **SETTINGS | {"sampler": sampler, "guidance_scale": scale})
    assert ours.shape == (2, 16, 16, 3)
    assert np.abs(ours - expected * 255).max() < 1.0, "equal but for rounding to bytes"


def test_values_without_guidance(sd, made):
    """As in a call with guided images, where the negative prompt has a row too; of values with two tokens each."""
    doses = [
        (),
        (Dose(VALUE, 20.0),),
        (Dose(VALUE), Dose(OTHER, 20.0)),
    ]  # much effect
    requests = [Request("a baker", 0, values, guidance_scale=1.0) for values in doses]
    alone = generate.generate(sd, requests, made["token"], **SETTINGS).astype(int)
    guided = [request._replace(guidance_scale=3.0) for request in requests]
    mixed = generate.generate(sd, requests + guided, made["token"], **SETTINGS)
    assert np.abs(alone - mixed[:3]).max() <= 1
    assert min(np.abs(alone[i] - alone[j]).max() for i, j in ((0, 1), (1, 2), (0, 2))) > 1


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


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_value_moves_the_pooled_text(sd, made, config, kind):
    """Of the second text encoder, whose pooled text the UNet is told."""
    kinds.assert_moves_pooled(sd, made[kind], of_kind(config, kind))


@pytest.mark.parametrize(
    "kind, pooled, states", [*((kind, False, 1) for kind in value_encoders.KINDS), ("full", True, 0)]
)
def test_the_exported_pipeline_draws_the_same_images(sd, made, config, published, tmp_path, kind, pooled, states):
    config = of_kind(config, kind, pooled=pooled, states=states)
    value_encoder = kinds.that_moves_pooled(made[kind], config) if pooled else made[kind]
    kinds.assert_export_draws_the_same(sd, value_encoder, config, published, tmp_path / "livo", SETTINGS)


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
