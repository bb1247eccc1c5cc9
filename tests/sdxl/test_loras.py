"""LoRAs of XL merge into what diffusers makes, by diffusers' names and by those that Stability AI published."""

import copy
import pathlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.torch import save_file

from livo_jax import StableDiffusion
from livo_jax.files.loras import _stability_name, merge_loras
from livo_jax.files.modules import skeleton
from livo_jax.models.unet import UNet2DConditionModel
from livo_jax.models.weights import published_name, split, to_published
from tests.files.test_loras import compare, fused, kohya, matrices, of_peft, text_names

ROOT = pathlib.Path(__file__).parents[2]
STABILITY = {  # of the small XL
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q": "input_blocks.3.1.transformer_blocks.1.attn1.to_q",
    "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
    "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.2": "output_blocks.1.1.transformer_blocks.0.ff.net.2",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0.conv_shortcut": "output_blocks.2.0.skip_connection",
    "up_blocks.1.resnets.1.time_emb_proj": "output_blocks.3.0.emb_layers.1",
}
TEXT = [f"encoder.layers.{name}" for name in ("1.self_attn.q_proj", "0.self_attn.out_proj", "0.mlp.fc2")]
LAYOUTS = {
    "Stability AI": lambda updates: kohya(updates, STABILITY.get),
    "kohya": kohya,
    "peft": of_peft,
}


@pytest.fixture
def updates(theirs):
    rng = np.random.default_rng(0)
    found = {"unet": matrices(theirs["unet"], STABILITY, rng)}
    for part in ("text_encoder", "text_encoder_2"):
        found[part] = matrices(theirs[part], text_names(theirs[part], TEXT), rng)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_merged_weights_are_diffusers(published, theirs, updates, layout, tmp_path):
    import diffusers

    file, sd = tmp_path / "style.safetensors", StableDiffusion.from_pretrained(published)
    if layout == "kohya":  # diffusers does not read this name
        updates["unet"].pop("add_embedding.linear_1")
    save_file(LAYOUTS[layout](updates), file, {"format": "pt"})
    pipeline = diffusers.StableDiffusionXLPipeline(
        **copy.deepcopy(theirs), tokenizer=None, tokenizer_2=None, scheduler=None, add_watermarker=False
    )
    sd.merge_loras([f"{file}=0.7"])
    compare(sd, fused(pipeline, file, 0.7), updates)


def test_the_text_encoders_alone(published, updates, tmp_path):
    """As a value encoder starts from them: what the file has for the UNet is another's."""
    file, sd = tmp_path / "style.safetensors", StableDiffusion.from_pretrained(published)
    save_file(kohya(updates), file)
    merged, none = merge_loras(sd.text_encoder, None, [file])
    sd.merge_loras([file])
    assert none is None and type(merged) is type(sd.text_encoder)
    ours, whole = (to_published(split(module)[1]) for module in (merged, sd.text_encoder))
    for name, array in whole.items():
        np.testing.assert_array_equal(ours[name], array)


def test_a_lora_of_another_family_is_refused(small_sd15, updates, tmp_path):
    file, before = tmp_path / "xl.safetensors", small_sd15.unet
    save_file(kohya(updates), file)
    with pytest.raises(ValueError, match="lora_te2_text_model_encoder_layers_0_mlp_fc2") as error:
        small_sd15.merge_loras([file])
    assert "unexpected lora_unet_add_embedding_linear_1.lora_up.weight" in str(error.value)
    assert small_sd15.unet is before


def test_the_full_sizes_blocks_are_numbered_as_diffusers_reads_them():
    """Each of XL base 1.0's attention layers by name, of other layers the block."""
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

    place = ROOT / "benchmarks" / "sdxl" / "unet"
    _, abstract = skeleton(UNet2DConditionModel, place)
    kernels = [path for path, _ in jax.tree_util.tree_leaves_with_path(abstract) if path[-1].key == "kernel"]
    names = [published_name(path).removesuffix(".weight") for path in kernels if "block" in path[0].key]
    keys = {f"lora_unet_{_stability_name(name, names).replace('.', '_')}.lora_down.weight": name for name in names}
    assert len(keys) == len(names) > 700
    read = _maybe_map_sgm_blocks_to_diffusers(keys, SimpleNamespace(layers_per_block=2))
    assert len(read) == len(names)
    for key, name in read.items():
        if "resnets" in name:  # whose inner names it translates later
            block = name.split(".")[: 3 if name.startswith("mid_block") else 4]
            assert key.startswith(f"lora_unet_{_as_read(block)}_"), (key, name)
        elif "attentions" in name:
            assert key == f"lora_unet_{_as_read(name.split('.'))}.lora_down.weight", (key, name)


def _as_read(parts: list[str]) -> str:
    sides = {"down_blocks": "input_blocks", "up_blocks": "output_blocks", "mid_block": "middle_block"}
    return "_".join([sides[parts[0]], *parts[1:]])
