"""Published files as they are found in the world: each loads, or is refused with what it is and what to do."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from configs import tiny
from livo_jax import StableDiffusion, ValueEncoder
from livo_jax.files import modules, repositories
from livo_jax.files.modules import initialise, load_module
from livo_jax.models.clip import CLIPTextConfig
from livo_jax.models.unet import UNet2DConditionModel, UNetConfig
from livo_jax.models.vae import AutoencoderKL, VAEConfig
from livo_jax.models.weights import from_published, split, to_published
from livo_jax.runs import train
from livo_jax.sampling import families
from livo_jax.value_encoders.lora import LoRA
from livo_jax.value_encoders.soft_tokens import SoftTokens
from tests.files.test_modules import rewrite

UNET_FILE = pathlib.Path("unet", "diffusion_pytorch_model.safetensors")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3438167536\n"


@pytest.fixture
def copy(published, tmp_path):
    return shutil.copytree(published, tmp_path / "model")


def rewrite_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "name", ["/no/such/directory", "~/none", "./none", "C:\\models\\sd15", "a/b/c", "x.safetensors"]
)
def test_a_path_where_nothing_is_is_no_hub_id(name):
    with pytest.raises(FileNotFoundError, match="nothing is there.*\n  hf download OWNER/NAME --local-dir"):
        StableDiffusion.from_pretrained(name)


def test_a_home_directory_is_found(published, monkeypatch):
    monkeypatch.setenv("HOME", str(published.parent))
    assert repositories.find_repository(f"~/{published.name}", []) == published


@pytest.mark.parametrize(
    "name", ["unet/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json", "vae/config.json"]
)
def test_pointers_of_git_lfs_are_told(copy, name):
    (copy / name).write_text(POINTER)
    with pytest.raises(ValueError, match=f"{name} are pointers of Git LFS.*\n  cd {copy} && .*git lfs pull"):
        StableDiffusion.from_pretrained(copy)


def test_other_formats_are_told_with_how_to_convert_them(copy, tmp_path):
    one = shutil.copy(copy / UNET_FILE, tmp_path / "one.safetensors")
    with pytest.raises(FileNotFoundError, match="is a file, .*\n.*from_single_file.*one.safetensors"):
        StableDiffusion.from_pretrained(one)
    (tmp_path / "alone").mkdir()
    one.rename(tmp_path / "alone" / "one.ckpt")
    with pytest.raises(FileNotFoundError, match="scheduler_config.*vae/config.json is missing\n.*\n.*from_single_file"):
        StableDiffusion.from_pretrained(tmp_path / "alone")
    pickle = (copy / UNET_FILE).rename((copy / UNET_FILE).with_suffix(".bin"))
    convert = r"can run code.*\n.*DiffusionPipeline as M; M.from_pretrained\('{}'\).save_pretrained"
    with pytest.raises(FileNotFoundError, match="There are .*model.bin.*" + convert.format(copy)):
        StableDiffusion.from_pretrained(copy)
    pickle.unlink()  # as the hub leaves it, from where none is fetched
    with pytest.raises(FileNotFoundError, match="There is none.*" + convert.format("OWNER/NAME")):
        StableDiffusion.from_pretrained(copy)


def test_a_damaged_config_is_told(copy):
    (copy / "vae" / "config.json").write_text("<<<<<<< HEAD\n{}\n=======\n{}\n>>>>>>> other\n")
    with pytest.raises(ValueError, match="vae/config.json is damaged.*merge conflict"):
        StableDiffusion.from_pretrained(copy)
    (copy / "vae" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="vae/config.json is damaged.*a list"):
        StableDiffusion.from_pretrained(copy)


def test_links_to_nothing_are_told(copy, tmp_path):
    """As of a snapshot of the hub's cache that was copied alone."""
    told = "links to a file that is not there: copy what it links to, as cp -rL does"
    for name in ("unet/diffusion_pytorch_model.safetensors", "vae/config.json"):
        (copy / name).rename(tmp_path / "moved")
        (copy / name).symlink_to("../blobs/0123")
        with pytest.raises(FileNotFoundError, match=f"{copy / name} {told}"):
            StableDiffusion.from_pretrained(copy)
        (copy / name).unlink()
        (tmp_path / "moved").rename(copy / name)


def test_what_is_no_value_encoder_is_told(sd, published, tmp_path):
    for kind in (ValueEncoder, LoRA, SoftTokens):
        with pytest.raises(FileNotFoundError, match="is a whole StableDiffusionPipeline.*subfolder='text_encoder'"):
            kind.from_pretrained(published, sd=sd)
    lora = tmp_path / "pytorch_lora_weights.safetensors"
    lora.touch()
    for kind, place in ((ValueEncoder, tmp_path), (LoRA, tmp_path), (LoRA, lora), (SoftTokens, tmp_path)):
        with pytest.raises(FileNotFoundError, match="a LoRA as scripts of diffusers.*\n.*text_encoder.save_pretrained"):
            kind.from_pretrained(place, sd=sd)
    with pytest.raises(FileNotFoundError, match="a LoRA as scripts of diffusers"):
        StableDiffusion.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip", "text_config": {}, "vision_config": {}}')
    with pytest.raises(ValueError, match="is a whole CLIP.*\n.*import CLIPTextModel as M.*save_pretrained"):
        ValueEncoder.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------- weights and their dtypes


def save_raw(tensors: dict, path, kinds: dict):
    """Writes arrays whose dtypes NumPy's safetensors do not know; `kinds` has a dtype's name in the file."""
    header, content = {}, b""
    for name, array in tensors.items():
        data = array.tobytes()
        places = [len(content), len(content) + len(data)]
        header[name] = {"dtype": kinds[array.dtype], "shape": array.shape, "data_offsets": places}
        content += data
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


@pytest.mark.parametrize("dtype, kind", [(jnp.float8_e4m3fn, "F8_E4M3"), (jnp.float8_e5m2, "F8_E5M2")])
def test_fp8_weights_load(copy, sd, dtype, kind):
    tensors = {name: array.astype(dtype) for name, array in load_file(copy / UNET_FILE).items()}
    save_raw(tensors, copy / UNET_FILE, {np.dtype(dtype): kind})
    ours = split(load_module(UNet2DConditionModel, copy / "unet", jnp.bfloat16))[1]
    expected = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(jnp.bfloat16), split(sd.unet)[1])
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t["conv_in.bias"].__setitem__(1, np.nan),
            f"{UNET_FILE}: 1 of 8 .* of conv_in.bias are not finite",
        ),
        (
            lambda t: t["conv_in.bias"].__setitem__(1, np.inf),
            f"{UNET_FILE}: 1 of 8 .* of conv_in.bias are not finite",
        ),
        (lambda t: t.update({"conv_in.bias": np.arange(8)}), f"{UNET_FILE}: conv_in.bias is of dtype I64.*quantised"),
        (lambda t: t.update({"conv_in.scale_weight": np.ones(1)}), f"{UNET_FILE} holds fp8 weights that want scales"),
    ],
    ids=["nan", "inf", "integers", "scaled fp8"],
)
def test_what_is_no_weight_is_refused_by_file_and_name(copy, change, message):
    rewrite(copy / UNET_FILE, change)
    with pytest.raises(ValueError, match=message):
        load_module(UNet2DConditionModel, copy / "unet")


def test_a_weight_that_float16_cannot_hold_is_refused(sd):
    params = split(sd.unet)[1]
    published = to_published(params) | {"conv_in.bias": np.full(8, 1e6, np.float32)}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    with pytest.raises(ValueError, match="conv_in.bias is too large for float16: load it in bfloat16"):
        from_published(published, abstract, jnp.float16)


def test_dtypes_by_their_usual_names(monkeypatch):
    for names, dtype in (("float32 fp32", jnp.float32), ("bfloat16 bf16", jnp.bfloat16)):
        assert {modules.read_dtype(name) for name in [*names.split(), dtype]} == {jnp.dtype(dtype)}
    for name in ("fp8", "float64", "", np.int8):
        with pytest.raises(ValueError, match="config.dtype=.*: choose float32, bfloat16 or float16"):
            modules.read_dtype(name, "config.dtype")
    for name in ("float16", "fp16", "half", jnp.float16):
        with pytest.raises(ValueError, match="dtype=.* wants a GPU or TPU: on a CPU choose float32 or bfloat16"):
            modules.read_dtype(name)
        with monkeypatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda: "gpu")
            assert modules.read_dtype(name) == jnp.float16


@pytest.mark.parametrize(
    "said, dtype", [({"force_upcast": True}, "float32"), ({}, "float32"), ({"force_upcast": False}, "float16")]
)
def test_a_vae_is_upcast_where_its_config_says_so(copy, said, dtype):
    file = copy / "vae" / "config.json"
    config = json.loads(file.read_text())
    del config["force_upcast"]  # which is true where nothing is said, as in diffusers
    file.write_text(json.dumps(config | said))
    for make in (load_module, initialise):
        for kind, part, expected in ((AutoencoderKL, "vae", dtype), (UNet2DConditionModel, "unet", "float16")):
            leaves = jax.tree.leaves(split(make(kind, copy / part, jnp.float16))[1])
            assert {leaf.dtype for leaf in leaves} == {jnp.dtype(expected)}


@pytest.mark.parametrize(
    "name, backend, message",
    [
        ("fp17", "cpu", "config.dtype='fp17': choose float32"),
        ("float16", "cpu", "config.dtype='float16' wants a GPU"),
        ("fp16", "gpu", "config.dtype='fp16': small gradients are 0 in float16.*train in bfloat16 or float32"),
    ],
)
def test_a_dtype_that_cannot_train_is_refused_before_anything_loads(name, backend, message, monkeypatch, tmp_path):
    config = tiny.get_config("smoke")
    config.dtype, config.model = name, "none/nowhere"
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with pytest.raises(ValueError, match=message):
        train.train_and_evaluate(config, tmp_path)


# ---------------------------------------------------------------------------- configs as they are published


@pytest.mark.parametrize(
    "size, is_xl, version, side",
    [
        (64, False, "0.6.0", 64), ([8, 8], False, "0.27.0", 8),
        (None, False, "0.27.0", 64), (None, True, "0.27.0", 128),
        (32, False, "0.27.0", 32), (32, True, "0.6.0", 32),
    ],
)  # fmt: skip
def test_sample_size(tmp_path, size, is_xl, version, side):
    (tmp_path / "unet").mkdir()
    file = tmp_path / "unet" / "config.json"
    file.write_text(json.dumps({"sample_size": size, "_diffusers_version": version}))
    assert families.latent_size(tmp_path, is_xl, 4) == side
    file.write_text("{}")
    assert families.latent_size(tmp_path, is_xl, 4) == (128 if is_xl else 64)
    file.write_text('{"sample_size": 32, "_diffusers_version": "0.6.0.dev0"}')  # of Stable Diffusions of 64
    with pytest.warns(UserWarning, match="sample_size=32 of diffusers before 0.9 is taken as 64"):
        assert families.latent_size(tmp_path, False, 4) == 64
    for wrong in ([8, 16], [8], "64", 0, 20, True, 6.5):
        file.write_text(json.dumps({"sample_size": wrong}))
        with pytest.raises(ValueError, match=r"unet/config.json: sample_size=.*square latents.* a multiple of 8"):
            families.latent_size(tmp_path, is_xl, 4)


def test_a_whole_directory_as_fine_tunes_of_2022_have_it(copy, sd):
    """Scheduler without clip_sample and steps_offset, sample_size a pair, a list of nothing."""
    scheduler = copy / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text())
    del config["clip_sample"], config["steps_offset"]
    scheduler.write_text(json.dumps(config))
    rewrite_json(copy / "unet" / "config.json", sample_size=[8, 8], only_cross_attention=[False, False])
    with pytest.warns(UserWarning, match="scheduler_config.json: clip_sample is taken as false.*; steps_offset is"):
        old = StableDiffusion.from_pretrained(copy)
    assert (old.image_size, old.latent_shape) == (sd.image_size, sd.latent_shape)
    assert old.scheduler_config["steps_offset"] == 1 and old.scheduler_config["clip_sample"] is False


@pytest.mark.parametrize(
    "kind, field, value",
    [
        (UNetConfig, "_class_name", "UNet3DConditionModel"), (UNetConfig, "mid_block_type", None),
        (UNetConfig, "time_cond_proj_dim", 256), (UNetConfig, "class_embed_type", "projection"),
        (UNetConfig, "encoder_hid_dim", 1024), (UNetConfig, "addition_embed_type", "text"),
        (UNetConfig, "attention_type", "gated"), (UNetConfig, "num_attention_heads", 8),
        (UNetConfig, "only_cross_attention", [True, False, False, False]), (UNetConfig, "cross_attention_dim", None),
        (UNetConfig, "cross_attention_dim", [768, 768, 768, 768]), (UNetConfig, "norm_num_groups", None),
        (UNetConfig, "transformer_layers_per_block", [1, [2, 2], [4, 4], 1]), (UNetConfig, "layers_per_block", [0] * 4),
        (UNetConfig, "attention_head_dim", "8"), (UNetConfig, "reverse_transformer_layers_per_block", [[1], 1]),
        (VAEConfig, "_class_name", "AsymmetricAutoencoderKL"), (VAEConfig, "shift_factor", "0.1159"),
        (VAEConfig, "latents_mean", [0.1, 0, 0, 0]), (VAEConfig, "latents_std", [1.0] * 4),
        (VAEConfig, "scaling_factor", None), (VAEConfig, "mid_block_add_attention", False),
        (VAEConfig, "down_block_types", ["AttnDownEncoderBlock2D"]), (VAEConfig, "use_quant_conv", None),
        (CLIPTextConfig, "model_type", "t5"), (CLIPTextConfig, "hidden_size", None),
        (CLIPTextConfig, "hidden_act", "relu"), (CLIPTextConfig, "quantization_config", {"load_in_4bit": True}),
    ],
    ids=str,
)  # fmt: skip
def test_a_field_that_would_change_the_numbers_is_refused_by_name(kind, field, value):
    with pytest.raises(ValueError, match=field):
        kind.from_json({field: value})


@pytest.mark.parametrize("lines", [0, -1])
def test_merges_that_are_cut_short_are_refused(copy, lines):
    """Words would fall into other tokens than those that the text encoder knows."""
    merges = copy / "tokenizer" / "merges.txt"
    merges.write_text("\n".join(merges.read_text().splitlines()[:lines]))
    with pytest.raises(ValueError, match="model/tokenizer: '.*' .* falls into pieces, so merges.txt is cut short"):
        StableDiffusion.from_pretrained(copy)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "vocab.json"])
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf{}", b'{"a'])
def test_a_damaged_file_of_a_tokenizer_is_told(copy, name, content):
    (copy / "tokenizer" / name).write_bytes(content)
    with pytest.raises(ValueError, match="model/tokenizer: a file of the tokenizer .*vocab.json.* is damaged"):
        StableDiffusion.from_pretrained(copy)


def test_a_tokenizer_without_padding_is_told(copy):
    rewrite_json(copy / "tokenizer" / "tokenizer_config.json", pad_token=None)
    with pytest.raises(ValueError, match="model/tokenizer: pad_token is null: write the published one"):
        StableDiffusion.from_pretrained(copy)


def test_more_tokens_than_embeddings_are_refused(copy):
    rewrite_json(copy / "text_encoder" / "config.json", vocab_size=100)
    with pytest.raises(ValueError, match=r"tokenizer has \d+ tokens, its text encoder 100 embeddings"):
        StableDiffusion.from_config(copy)


def test_clip_skip_by_the_number_of_layers(copy, sd):
    """Layers that the config does not want are left out, as transformers leaves them out; other names still count."""
    from transformers import CLIPTextModel

    directory = copy / "text_encoder"
    rewrite_json(directory / "config.json", num_hidden_layers=1)
    with pytest.warns(UserWarning, match="num_hidden_layers=1, the weights have 2: the last 1 are not used"):
        ours = ValueEncoder.from_pretrained(copy, subfolder="text_encoder")
    ids = sd.tokenize(["a baker"])
    expected = CLIPTextModel.from_pretrained(directory)(torch.tensor(ids)).last_hidden_state.detach()
    np.testing.assert_allclose(ours(ids).last_hidden_state, expected, atol=1e-5)
    rewrite(directory / "model.safetensors", lambda tensors: tensors.update({"text_model.extra": np.ones(1)}))
    with pytest.warns(UserWarning, match="num_hidden_layers=1"), pytest.raises(ValueError, match="unexpected .*extra"):
        ValueEncoder.from_pretrained(copy, subfolder="text_encoder")
