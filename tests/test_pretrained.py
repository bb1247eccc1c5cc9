"""Published directories load exactly, and what is wrong with one is said at once."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from livo_jax import StableDiffusion, ValueEncoder
from livo_jax.models.weights import from_published, split, to_published
from livo_jax.pretrained import save


@pytest.fixture
def copy(published, tmp_path):
    return shutil.copytree(published, tmp_path / "model")


def rewrite(path, change):
    """Applies `change` to the state dict of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_round_trip_is_bit_exact(sd, published, torch_models):
    for name in ("unet", "vae", "text_encoder"):
        expected = {k: v.numpy() for k, v in torch_models[name].state_dict().items()}
        got = to_published(split(getattr(sd, name))[1])
        assert got.keys() == {k.removeprefix("text_model.") for k in expected}
        for key, array in expected.items():
            assert np.array_equal(got[key.removeprefix("text_model.")], array), key


def test_old_names_and_buffers_load(copy, sd):
    def old_vae(tensors):
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            for name in [n for n in tensors if f"attentions.0.{new}." in n]:
                tensors[name.replace(new, old)] = tensors.pop(name)

    def old_text(tensors):
        for name in list(tensors):
            tensors["text_model." + name.removeprefix("text_model.")] = tensors.pop(name)
        tensors["text_model.embeddings.position_ids"] = np.arange(16)[None]

    rewrite(copy / "vae" / "diffusion_pytorch_model.safetensors", old_vae)
    rewrite(copy / "text_encoder" / "model.safetensors", old_text)
    old = StableDiffusion.from_pretrained(copy)
    for part in ("vae", "text_encoder"):
        jax.tree.map(np.testing.assert_array_equal, split(getattr(old, part))[1], split(getattr(sd, part))[1])


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_value_encoder_takes_both_key_styles_and_a_dtype(sd, published, tmp_path, prefix):
    config = json.loads((published / "text_encoder" / "config.json").read_text())
    save(sd.text_encoder, tmp_path, config, stem="model", prefix=prefix)
    assert all(name.startswith(prefix) for name in load_file(tmp_path / "model.safetensors"))
    ids = sd.tokenize(["a baker"])
    ours = ValueEncoder.from_pretrained(tmp_path)
    np.testing.assert_array_equal(ours(ids).pooled, sd.text_encoder(ids).pooled)
    assert ValueEncoder.from_pretrained(tmp_path, jnp.bfloat16)(ids).pooled.dtype == jnp.bfloat16


def test_all_wrong_weights_are_listed(copy):
    def spoil(tensors):
        tensors["conv_in.extra"] = tensors.pop("conv_in.bias")
        tensors["conv_out.weight"] = tensors["conv_out.weight"][:, :-1]

    rewrite(copy / "unet" / "diffusion_pytorch_model.safetensors", spoil)
    with pytest.raises(ValueError) as error:
        StableDiffusion.from_pretrained(copy)
    for part in ("unet", "3 weights", "missing conv_in.bias", "unexpected conv_in.extra", "misshapen conv_out.weight"):
        assert part in str(error.value)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (lambda d: shutil.rmtree(d / "vae"), FileNotFoundError, "vae/config.json is missing"),
        (lambda d: (d / "unet" / "diffusion_pytorch_model.safetensors").unlink(), FileNotFoundError, "unet has no"),
        (lambda d: truncate(d / "unet" / "diffusion_pytorch_model.safetensors"), ValueError, "cut short, fetch it"),
        (lambda d: (d / "unet" / "config.json").write_text("{"), ValueError, "config.json is damaged"),
        (lambda d: (d / "scheduler" / "scheduler_config.json").unlink(), FileNotFoundError, "scheduler_config.json"),
    ],
)
def test_missing_and_damaged_files(copy, spoil, error, message):
    spoil(copy)
    with pytest.raises(error, match=message):
        StableDiffusion.from_pretrained(copy)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(_class_name="FlowMatchEulerDiscreteScheduler"), "unknown scheduler 'FlowMatch.*known are DDIM"),
        (dict(prediction_type="sample"), "prediction_type='sample'"),
    ],
)
def test_unknown_schedulers(copy, change, message):
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        StableDiffusion.from_pretrained(copy)


@pytest.mark.parametrize("name", ["no/such-model", "/no/such/directory", "not a name"])
def test_a_missing_model_says_how_to_fetch_it(name):
    with pytest.raises(FileNotFoundError, match=f"hf download {name}"):
        StableDiffusion.from_pretrained(name)


def test_half_precision_variant_is_read_when_alone(copy, sd):
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({k: v.astype(np.float16) for k, v in load_file(path).items()}, path.with_name("x.fp16.safetensors"))
    both = StableDiffusion.from_pretrained(copy)
    jax.tree.map(np.testing.assert_array_equal, split(both.vae)[1], split(sd.vae)[1])
    path.unlink()
    half = split(StableDiffusion.from_pretrained(copy).vae)[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.float16)), half, split(sd.vae)[1])


def test_long_prompts_are_cut_with_a_warning_that_quotes(sd):
    words = "a photo of a baker at work on a bloody day " * 2
    with pytest.warns(UserWarning, match="longer than 16 tokens; cut off: 'a baker at work on a bloody day'"):
        ids = sd.tokenize([words, "a baker"])
    assert ids.shape == (2, 16) and ids.dtype == np.int32 and ids[0, -1] == ids[1, -1] == sd.tokenizer.eos_token_id


def test_strict_conversion_counts_every_leaf(sd):
    params = split(sd.unet)[1]
    published = to_published(params)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    jax.tree.map(np.testing.assert_array_equal, from_published(published, abstract), params)
