"""Blocks of equal structure and shapes share one program."""

from functools import partial

import jax
import numpy as np
from flax import nnx

from livo_jax.models.clip import CLIPTextConfig, CLIPTextModel
from livo_jax.models.layers import once
from livo_jax.models.unet import BasicTransformerBlock, UNet2DConditionModel, UNetConfig
from livo_jax.models.weights import one_key, split
from tests.conftest import UNET

KEYS = one_key()


def lowered(make, *args) -> str:
    """What a module's call is lowered to, of shapes alone."""
    graph, params = split(nnx.eval_shape(make))
    return jax.jit(lambda params, *args: nnx.merge(graph, params)(*args)).lower(params, *args).as_text()


def test_a_text_encoder_is_lowered_as_one_layer():
    """But for its calls, whatever its depth."""

    def text_model(layers):
        sizes = dict(vocab_size=50, hidden_size=20, intermediate_size=28, num_attention_heads=4)
        return CLIPTextModel(CLIPTextConfig(num_hidden_layers=layers, **sizes), rngs=KEYS)

    few, many = (lowered(partial(text_model, layers), jax.ShapeDtypeStruct((2, 8), np.int32)) for layers in (2, 6))
    for operation in ("stablehlo.dot_general", "stablehlo.exponential"):
        assert many.count(operation) == few.count(operation) > 0


def test_a_unet_is_lowered_as_one_transformer_block_of_each_level():
    def unet(layers):
        config = UNET | {"transformer_layers_per_block": layers}
        return UNet2DConditionModel(UNetConfig.from_json(config), rngs=KEYS)

    args = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((2, 8, 8, 4), (2,), (2, 5, 20))]
    few, many = (lowered(partial(unet, layers), *args) for layers in (2, 4))
    assert many.count("stablehlo.dot_general") == few.count("stablehlo.dot_general") > 0


def test_a_block_of_other_weights_or_shapes_computes_its_own():
    blocks = [BasicTransformerBlock(8, 2, 6, rngs=nnx.Rngs(seed)) for seed in range(2)]
    rng = np.random.default_rng(0)
    for tokens in (3, 4):
        x, cond = rng.standard_normal((2, tokens, 8), np.float32), rng.standard_normal((2, 5, 6), np.float32)
        found = [np.asarray(once(block, x, cond, None)) for block in blocks]
        for block, ours in zip(blocks, found):
            np.testing.assert_allclose(ours, block(x, cond, None), atol=1e-5)
        assert np.abs(found[0] - found[1]).max() > 0.1
