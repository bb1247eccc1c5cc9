"""LoRAs of every layout merge into what diffusers' load_lora_weights and fuse_lora make; what does not fit is told."""

import copy
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from configs import tiny
from livo_jax import StableDiffusion, sharding
from livo_jax.export import export
from livo_jax.files.loras import METADATA
from livo_jax.files.repositories import LORA
from livo_jax.models.weights import LEGACY, split, to_published
from livo_jax.runs import restore
from tests.sampling.test_generate import published_pipeline

TEXT = "encoder.layers.1.self_attn.q_proj encoder.layers.0.self_attn.out_proj encoder.layers.1.mlp.fc1".split()
ATTENTION = ["down_blocks.1.attentions.0.transformer_blocks.0." + name for name in ("attn1.to_q", "attn2.to_out.0")]
LINEAR = [*ATTENTION, "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj", "mid_block.attentions.0.proj_in"]
CONVOLUTIONS = ["down_blocks.0.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv", "up_blocks.0.upsamplers.0.conv"]


def matrices(module, names, rng, alphas=(3.0,)) -> dict[str, dict[str, torch.Tensor]]:
    """Random updates of a PyTorch module's layers, of ranks that differ; alphas are taken in turn."""
    found = {}
    for k, name in enumerate(names):
        weight, rank = module.get_submodule(name).weight, 2 + k % 3
        down = torch.tensor(rng.normal(size=(rank, *weight.shape[1:])), dtype=torch.float32)
        up = torch.tensor(rng.normal(size=(len(weight), rank, *[1] * (weight.ndim - 2))), dtype=torch.float32)
        found[name] = {"down": down, "up": up, "alpha": torch.tensor(alphas[k % len(alphas)])}
    return found


def text_names(module, names):
    """As the installed transformers has them."""
    prefix = "text_model." if hasattr(module, "text_model") else ""
    return [prefix + name for name in names]


def in_text_model(name: str) -> str:
    return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"


def kohya(updates, rename=lambda name: name) -> dict:
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    if "text_encoder_2" in updates:
        prefixes |= {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    file = {}
    for part, layers in updates.items():
        for name, found in layers.items():
            own = rename(name) if part == "unet" else in_text_model(name)
            layer = prefixes[part] + own.replace(".", "_")
            file |= {f"{layer}.lora_{side}.weight": found[side] for side in ("down", "up")}
            file[f"{layer}.alpha"] = found["alpha"]
    return file


def of_peft(updates, in_text_model=in_text_model) -> dict:
    file = {}
    for part, layers in updates.items():
        for name, found in layers.items():
            own = name if part == "unet" else in_text_model(name)
            file |= {f"{part}.{own}.lora_A.weight": found["down"], f"{part}.{own}.lora_B.weight": found["up"]}
    return file


def with_settings(updates) -> dict:
    """By the installed transformers' names, which the settings' are compared with."""
    return of_peft(updates, in_text_model=str)


def of_processors(updates) -> dict:
    """As diffusers wrote them before it knew peft."""
    file = {}
    for part, layers in updates.items():
        for name, found in layers.items():
            for side in ("down", "up"):
                if part != "unet":
                    key = f"{in_text_model(name)}.lora_linear_layer.{side}.weight"
                elif ".attn" in name:
                    block, layer = name.removesuffix(".0").rsplit(".", 1)
                    key = f"{block}.processor.{layer}_lora.{side}.weight"
                else:
                    key = f"{name}.lora.{side}.weight"
                file[f"{part}.{key}"] = found[side]
    return file


def settings_of(updates) -> dict[str, str]:
    """What diffusers writes of peft's settings into the file."""
    found = {}
    for part, layers in updates.items():
        found |= {
            f"{part}.r": 4, f"{part}.lora_alpha": 3, f"{part}.target_modules": [*layers],
            f"{part}.rank_pattern": {name: len(update["down"]) for name, update in layers.items()},
            f"{part}.alpha_pattern": {name: 5 for name in [*layers][:1]},
        }  # fmt: skip
    return {METADATA: json.dumps(found)}


def published(module) -> dict[str, np.ndarray]:
    """A PyTorch module's weights by the names that ours have."""
    found = {}
    for name, tensor in module.state_dict().items():
        for pattern, replacement in LEGACY:
            name = pattern.sub(replacement, name)
        found[name] = tensor.detach().numpy()
    return found


def compare(sd, pipeline, updates):
    """Weights are the pipeline's, and those of the updates' layers alone have changed."""
    towers = dict(zip(("text_encoder", "text_encoder_2"), sd.text_encoder.towers))
    base = StableDiffusion.from_pretrained(sd.root)
    before = dict(zip(towers, base.text_encoder.towers)) | {"unet": base.unet}
    for part, module in {**towers, "unet": sd.unet}.items():
        theirs, ours = published(getattr(pipeline, part)), to_published(split(module)[1])
        was, changed = to_published(split(before[part])[1]), set()
        for name, array in ours.items():
            np.testing.assert_allclose(array, theirs[name], rtol=1e-5, atol=1e-5, err_msg=name)
            if np.abs(array - was[name]).max() > 1e-3:
                changed.add(name.removesuffix(".weight"))
        assert changed == {name.removeprefix("text_model.") for name in updates.get(part, ())}


def fused(pipeline, file, scale):
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    pipeline.fuse_lora(lora_scale=scale)
    pipeline.unload_lora_weights()
    return pipeline


@pytest.fixture
def sd(published):
    return StableDiffusion.from_pretrained(published)


LAYOUTS = {"kohya": kohya, "peft": of_peft, "peft with settings": with_settings, "processors": of_processors}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_merged_weights_are_diffusers(sd, published, torch_models, layout, tmp_path):
    rng, models = np.random.default_rng(0), copy.deepcopy(torch_models)
    names = LINEAR if layout == "processors" else LINEAR + CONVOLUTIONS
    updates = {
        "unet": matrices(models["unet"], names, rng),
        "text_encoder": matrices(models["text_encoder"], text_names(models["text_encoder"], TEXT), rng),
    }
    file = tmp_path / "style.safetensors"
    metadata = settings_of(updates) if layout == "peft with settings" else {}
    save_file(LAYOUTS[layout](updates), file, metadata | {"format": "pt"})
    pipeline = published_pipeline(sd, published, models, "DDIMScheduler")
    sd.merge_loras([f"{file}=0.7"])
    compare(sd, fused(pipeline, file, 0.7), updates)


def test_an_alpha_of_each_layer_and_several_files(sd, torch_models, tmp_path):
    """As the paper has it, of linear layers and convolutions: diffusers loses alphas of attention that differ."""
    rng, unet, entries = np.random.default_rng(0), torch_models["unet"], []
    expected = {name: unet.get_submodule(name).weight.detach().numpy() for name in LINEAR + CONVOLUTIONS}
    for k, scale in enumerate((1.0, -0.5)):
        updates = matrices(unet, [*expected], rng, alphas=(1.0, 2))  # int64 too, as torch.tensor(2) is
        save_file(kohya({"unet": updates}), tmp_path / f"{k}.safetensors")
        entries.append(tmp_path / f"{k}.safetensors" if scale == 1 else f"{tmp_path / f'{k}.safetensors'}={scale}")
        for name, found in updates.items():
            product = np.einsum("or,r...->o...", found["up"].flatten(1), found["down"])
            expected[name] = expected[name] + scale * found["alpha"].item() / len(found["down"]) * product
    sd.merge_loras(entries)
    ours = to_published(split(sd.unet)[1])
    for name, array in expected.items():
        np.testing.assert_allclose(ours[f"{name}.weight"], array, rtol=1e-5, atol=1e-5)


def test_a_merged_model_keeps_dtype_and_place(published, torch_models, tmp_path):
    file, mesh = tmp_path / "lora.safetensors", sharding.make_mesh(2, 2, 2)
    save_file(kohya({"unet": matrices(torch_models["unet"], LINEAR, np.random.default_rng(0))}), file)
    place = functools.partial(sharding.by_rules, mesh=mesh)
    sd, whole = (StableDiffusion.from_pretrained(published, **kw) for kw in ({"sharding": place}, {}))
    half = StableDiffusion.from_pretrained(published, jnp.bfloat16)
    was = jax.tree.map(lambda x: x.sharding, split(sd.unet)[1])
    for model in (sd, whole, half):
        model.merge_loras([file])
    assert jax.tree.map(lambda x: x.sharding, split(sd.unet)[1]) == was
    jax.tree.map(np.testing.assert_array_equal, split(sd.unet)[1], split(whole.unet)[1])
    assert {x.dtype for x in jax.tree.leaves(split(half.unet)[1])} == {jnp.dtype(jnp.bfloat16)}


def test_a_run_and_its_value_encoder_start_from_the_merged_model(published, torch_models, tmp_path):
    """Of kind full too, which reads the text encoder's file itself."""
    text_encoder, rng = torch_models["text_encoder"], np.random.default_rng(0)
    updates = {
        "unet": matrices(torch_models["unet"], LINEAR, rng),
        "text_encoder": matrices(text_encoder, text_names(text_encoder, TEXT), rng),
    }
    save_file(kohya(updates), tmp_path / LORA)
    config, mesh = tiny.get_config(), sharding.make_mesh(1)
    config.model, config.loras = str(published), (f"{tmp_path}=0.5",)
    sd, value_encoder = restore.load_models(config, mesh)
    expected = StableDiffusion.from_pretrained(published)
    expected.merge_loras([f"{tmp_path / LORA}=0.5"])
    for ours, theirs in ((sd.unet, expected.unet), (sd.text_encoder, expected.text_encoder)):
        jax.tree.map(np.testing.assert_array_equal, split(ours)[1], split(theirs)[1])
    jax.tree.map(np.testing.assert_array_equal, split(value_encoder)[1], split(expected.text_encoder)[1])
    card = export.card(config, (), None)
    assert f"pipe.load_lora_weights({LORA!r})\npipe.fuse_lora(lora_scale=0.5)\n" in card
    assert f"sd.merge_loras(['{LORA}=0.5'])\nve = " in card and str(tmp_path) not in card


def test_what_does_not_fit_is_listed(sd, torch_models, tmp_path):
    """All of it, of all files, and nothing is merged."""
    rng, unet = np.random.default_rng(0), torch_models["unet"]
    good = kohya({"unet": matrices(unet, LINEAR[:1], rng)})
    layer = next(iter(good)).split(".")[0]
    wide = {f"{layer}.lora_down.weight": torch.zeros(2, 99), f"{layer}.lora_up.weight": torch.zeros(16, 2)}
    alone = {f"{layer}.lora_up.weight": torch.zeros(16, 2)}
    odd = {
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0),  # XL's second text encoder
        f"{layer}.hada_w1_a": torch.zeros(2), f"{layer}.dora_scale": torch.zeros(2),
        f"{layer}.lora_mid.weight": torch.zeros(2), "transformer.blocks.0.lora_A.weight": torch.zeros(2, 2),
    }  # fmt: skip
    thin = {f"{layer}.lora_down.weight": torch.zeros(0, 16), f"{layer}.lora_up.weight": torch.zeros(16, 0)}
    twice = {f"unet.{LINEAR[0]}.lora_A.weight": torch.zeros(2, 16), f"{layer}.alpha": torch.zeros(2)}
    flat = {f"{layer}.lora_down.weight": torch.tensor(0.0), f"{layer}.lora_up.weight": torch.zeros(16, 2)}
    files = {"wide": wide, "alone": alone, "odd": good | odd, "empty": {}, "thin": thin, "twice": good | twice}
    files["flat"] = flat
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    was = to_published(split(sd.unet)[1])
    with pytest.raises(ValueError, match="12 weights of LoRAs fit nothing in the model") as error:
        sd.merge_loras([str(tmp_path / f"{name}.safetensors") for name in files])
    told = str(error.value)
    assert f"wide.safetensors: misshapen unet.{LINEAR[0]}: (16, 2) times (2, 99), (" in told
    assert f"alone.safetensors: missing down of unet.{LINEAR[0]}" in told
    assert all(f"odd.safetensors: unexpected {key} (" in told for key in odd)
    assert f"twice.safetensors: unet.{LINEAR[0]}.lora_A.weight is there twice, by two names of a layer" in told
    assert f"twice.safetensors: {layer}.alpha (2,) is no number" in told
    assert f"flat.safetensors: misshapen unet.{LINEAR[0]}: (16, 2) times (), (" in told
    assert "empty.safetensors: it holds no update at all" in told
    assert f"thin.safetensors: misshapen unet.{LINEAR[0]}: (16, 0) times (0, 16), (" in told
    jax.tree.map(np.testing.assert_array_equal, to_published(split(sd.unet)[1]), was)


@pytest.mark.parametrize(
    "settings, told",
    [
        ("{", "its lora_adapter_metadata is no JSON"),
        ("null", "its lora_adapter_metadata is null, no object"),
        ('{"unet.lora_alpha": null}', "unet: lora_alpha=None in its lora_adapter_metadata is no number"),
        ('{"unet.alpha_pattern": {"to_q(": 2}}', "unet: 'to_q(' in its lora_adapter_metadata is no pattern"),
        ('{"unet.use_dora": true}', "unet: not supported: use_dora=True"),
        ('{"unet.a_field_of_tomorrow": 1}', "unet: not supported: a_field_of_tomorrow=1"),
        ('{"unet.init_lora_weights": "pissa"}', "unet: not supported: init_lora_weights='pissa', which changes the"),
    ],
)
def test_settings_that_cannot_be_followed_are_told(sd, torch_models, tmp_path, settings, told):
    updates = kohya({"unet": matrices(torch_models["unet"], LINEAR[:1], np.random.default_rng(0))})
    save_file(updates, tmp_path / LORA, metadata={METADATA: settings})
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: {told}")):
        sd.merge_loras([str(tmp_path)])


@pytest.mark.parametrize(
    "entry, error, message",
    [
        ("none.safetensors", FileNotFoundError, "'none.safetensors': there is no none.safetensors"),
        ("style.safetensors=much", ValueError, "'style.safetensors=much': what follows the last = is the scale"),
        ("style.safetensors=nan", ValueError, "the scale, a number"),
        ("style.safetensors=1e39", ValueError, "a number that float32 holds"),
        ("style.ckpt", ValueError, "read from .safetensors alone"),
        (".", FileNotFoundError, "there is no pytorch_lora_weights.safetensors"),
        ("owner/name/style.safetensors", FileNotFoundError, "no model at 'owner/name'"),
        ("damaged.safetensors", ValueError, "damaged.safetensors is damaged or cut short"),
    ],
)
def test_files_that_cannot_be_read_are_told(sd, tmp_path, monkeypatch, entry, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.safetensors").write_bytes(b"no")
    with pytest.raises(error, match=message):
        sd.merge_loras([entry])
