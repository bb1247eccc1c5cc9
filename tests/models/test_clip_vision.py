"""All of CLIP computes what transformers computes with the same published weights."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from livo_jax.files.modules import load_module
from livo_jax.models.clip import CLIPModel
from livo_jax.models.weights import split, to_published
from tests.conftest import randomised, relative_error


def clip(vocab_size=100, eos_token_id=99, act="quick_gelu"):
    """A random transformers.CLIPModel whose widths all differ."""
    from transformers import CLIPConfig, CLIPModel

    text = dict(
        vocab_size=vocab_size, hidden_size=20, intermediate_size=28, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=16, bos_token_id=vocab_size - 2, eos_token_id=eos_token_id, pad_token_id=eos_token_id,
        hidden_act=act,
    )  # fmt: skip
    vision = dict(
        hidden_size=24, intermediate_size=44, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8,
        hidden_act=act,
    )  # fmt: skip
    return randomised(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)))


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_clip(act, tmp_path):
    torch.manual_seed(3)
    theirs = clip(act=act)
    theirs.save_pretrained(tmp_path)
    ours = load_module(CLIPModel, tmp_path)
    ids, pixels = torch.randint(3, 97, (5, 16)), torch.randn(3, 3, 32, 32)
    ids[0, 5:], ids[1, 3], ids[2:, -1] = 99, 99, 99
    our_ids, our_pixels = jnp.asarray(ids.numpy()), np.moveaxis(pixels.numpy(), 1, -1)
    with torch.no_grad():
        expected, vision = theirs(ids, pixels), theirs.vision_model(pixels)
        image, text = (x.pooler_output for x in (theirs.get_image_features(pixels), theirs.get_text_features(ids)))
    got = ours.vision_model(our_pixels)
    assert relative_error(got.last_hidden_state, vision.last_hidden_state) < 1e-4
    assert relative_error(got.pooled, vision.pooler_output) < 1e-4
    image_features, text_features = ours.image_features(our_pixels), ours.text_features(our_ids)
    assert relative_error(image_features, image) < 1e-4
    assert relative_error(text_features, text) < 1e-4
    assert relative_error(ours.logits(image_features, text_features), expected.logits_per_image) < 1e-4


def test_its_names_are_the_published_ones(tmp_path):
    theirs = clip()
    theirs.save_pretrained(tmp_path)
    got = to_published(split(load_module(CLIPModel, tmp_path))[1])
    expected = {name: x.numpy() for name, x in theirs.state_dict().items() if not name.endswith("position_ids")}
    assert got.keys() == expected.keys()
    assert {"vision_model.pre_layrnorm.weight", "vision_model.embeddings.class_embedding", "logit_scale"} <= got.keys()
    for name, array in expected.items():
        assert np.array_equal(got[name], array), name


def test_it_computes_in_its_weights_dtype(tmp_path):
    clip().save_pretrained(tmp_path)
    half = load_module(CLIPModel, tmp_path, jnp.bfloat16)
    image = half.image_features(jnp.zeros((2, 32, 32, 3)))
    text = half.text_features(jnp.full((1, 16), 99))
    assert image.dtype == text.dtype == half.logits(image, text).dtype == jnp.bfloat16


def test_the_published_config_is_read():
    """That of openai/clip-vit-large-patch14, with every kind of field that it carries."""
    old = dict(
        add_cross_attention=False, architectures=None, attention_dropout=0.0, bad_words_ids=None,
        chunk_size_feed_forward=0, diversity_penalty=0.0, dropout=0.0, early_stopping=False,
        id2label={"0": "LABEL_0", "1": "LABEL_1"}, initializer_factor=1.0, initializer_range=0.02,
        label2id={"LABEL_0": 0, "LABEL_1": 1}, layer_norm_eps=1e-05, length_penalty=1.0, max_length=20,
        num_beams=1, num_return_sequences=1, hidden_act="quick_gelu", num_hidden_layers=12, projection_dim=768,
        pruned_heads={}, repetition_penalty=1.0, return_dict=True, temperature=1.0, tie_word_embeddings=True, top_k=50,
        top_p=1.0, torch_dtype=None, torchscript=False, transformers_version="4.16.0.dev0", typical_p=1.0,
    )  # fmt: skip
    text = old | dict(
        model_type="clip_text_model", bos_token_id=0, eos_token_id=2, pad_token_id=1, hidden_size=768,
        intermediate_size=3072, max_position_embeddings=77, num_attention_heads=12, vocab_size=49408,
    )  # fmt: skip
    vision = old | dict(
        model_type="clip_vision_model", hidden_size=1024, image_size=224, intermediate_size=4096,
        num_attention_heads=16, num_hidden_layers=24, patch_size=14,
    )  # fmt: skip
    published = dict(
        _name_or_path="clip-vit-large-patch14/", architectures=["CLIPModel"], initializer_factor=1.0,
        logit_scale_init_value=2.6592, model_type="clip", projection_dim=768, torch_dtype="float32",
        text_config=text, text_config_dict=dict(hidden_size=768), vision_config=vision | dict(num_hidden_layers=2),
        vision_config_dict=dict(num_hidden_layers=24), transformers_version=None,
    )  # fmt: skip
    config = CLIPModel.Config.from_json(published)
    assert (config.projection_dim, config.text_config.hidden_size, config.text_config.eos_token_id) == (768, 768, 2)
    assert (config.vision_config.num_hidden_layers, config.vision_config.patch_size) == (24, 14)
    published["vision_config"]["attention_bias"] = True
    with pytest.raises(ValueError, match="CLIPVisionConfig does not support: attention_bias=True"):
        CLIPModel.Config.from_json(published)
