"""Weights of 8 bits: a quarter of the bytes, nearly the same numbers, and the gradients of the weights as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import tiny
from livo_jax import StableDiffusion
from livo_jax.models.quantised import DTYPES, quantised, whole
from livo_jax.models.weights import split
from livo_jax.sampling.stable_diffusion import quantise
from livo_jax.training.batch import draw_noise
from livo_jax.training.objective import make_loss, split_models
from livo_jax.value_encoders import LoRA, copy_of
from tests.conftest import batch_of, relative_error

LAYERS = {
    "linear": (nnx.Linear, (24, 40), {}),
    "bare": (nnx.Linear, (24, 40), {"use_bias": False}),
    "convolution": (nnx.Conv, (24, 40, (3, 3)), {"strides": 2, "padding": ((0, 1), (0, 1))}),
}
# A weight is off by half a step of its channel's: of int8 largest / 127, of fp8's 3 bits a 16th of itself.
STEP = {"int8": 0.5 / 127, "fp8": 1 / 16}


def made(kind, dtype, weights=jnp.float32):
    """A layer, and the same quantised."""
    layer_class, sizes, options = LAYERS[kind]
    layer = layer_class(*sizes, rngs=nnx.Rngs(0), param_dtype=weights, **options)
    if layer.bias is not None:
        layer.bias[...] = jnp.arange(40, dtype=weights)
    module = nnx.Dict(layer=layer)
    return layer, quantised(module, lambda kernel: quantise(kernel, DTYPES[dtype]))["layer"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_computes_with_what_8_bits_hold(kind, dtype):
    layer, ours = made(kind, dtype)
    kernel = np.asarray(layer.kernel[...])
    largest = np.abs(kernel).reshape(-1, 40).max(0)
    held = ours.restored()
    assert (np.abs(held.kernel[...] - kernel) <= STEP[dtype] * largest + 1e-7).all()
    assert ours.kernel[...].nbytes * 4 == kernel.nbytes and ours.kernel_scale[...].size == 40
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 24))
    np.testing.assert_allclose(ours(x), held(x), rtol=1e-6, atol=1e-6)
    assert relative_error(ours(x), layer(x)) < 3 * STEP[dtype]

    def loss(layer, x):
        return jnp.sum(layer(x) ** 2)

    np.testing.assert_allclose(jax.grad(loss, 1)(ours, x), jax.grad(loss, 1)(held, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_backward_pass_is_left_8_bits(kind):
    layer, ours = made(kind, "int8", jnp.bfloat16)
    assert ours(jnp.ones((1, 4, 4, 24), jnp.bfloat16)).dtype == jnp.bfloat16
    graph, params = split(ours)

    def kept(graph, params):
        _, backward = jax.vjp(lambda x: nnx.merge(graph, params)(x), jnp.ones((1, 4, 4, 24), jnp.bfloat16))
        return sum(x.nbytes for x in jax.tree.leaves(backward) if x.size >= layer.kernel.size)

    assert kept(*split(layer)) == layer.kernel[...].nbytes == 2 * kept(graph, params)


def test_blocks_that_gather_are_left_8_bits_too(small):
    """They keep all of what they compute but what they gather."""
    sd = StableDiffusion.from_config(small[0].root, jnp.bfloat16)
    sd.quantise("int8")
    sd.unet.gather = lambda x, params: (x, params)
    graph, params = split(sd.unet)
    z_t, cond = jnp.zeros((1, *sd.latent_shape)), jnp.zeros((1, *sd.family.states_shape))

    def kept(graph, params):
        backward = jax.eval_shape(
            lambda z_t: jax.vjp(lambda z_t: nnx.merge(graph, params)(z_t, jnp.zeros(1), cond), z_t)[1], z_t
        )
        found = [x for x in jax.tree.leaves(backward) if x.shape in kernels]
        return [x for x in found if jnp.issubdtype(x.dtype, jnp.floating)]

    kernels = {x.shape for x in jax.tree.leaves(params) if x.dtype == jnp.int8}
    assert kept(*split(whole(sd.unet))) and not kept(graph, params)


def test_a_step_has_the_gradients_of_the_weights_that_8_bits_hold(small):
    """Of lora too, which reads the text encoder; a copy of it is of what its weights hold."""
    sd, same = (StableDiffusion.from_config(small[0].root) for _ in range(2))
    for one in (sd, same):
        one.quantise("int8")
    same.text_encoder, same.unet, same.vae = map(whole, (same.text_encoder, same.unet, same.vae))
    size = {one: sum(x.nbytes for x in jax.tree.leaves(split(one.unet)[1])) for one in (sd, same)}
    assert size[sd] < 0.4 * size[same]
    full = copy_of(sd.text_encoder)
    jax.tree.map(np.testing.assert_array_equal, split(full)[1], split(copy_of(same.text_encoder))[1])
    lora = LoRA(sd.text_encoder, rank=2, alpha=2.0, targets=("q_proj", "fc1"), rngs=nnx.Rngs(0))
    batch, noise = batch_of(sd), draw_noise(jax.random.key(0), (8, *sd.latent_shape), (0, 1000))
    found = []
    for one in (sd, same):
        networks, params, frozen = split_models(one, lora, with_vae=True)
        loss = jax.jit(jax.value_and_grad(make_loss(networks, tiny.get_config()), has_aux=True))
        found.append(loss(params, frozen, batch, noise))
    ((ours, _), gradients), ((theirs, _), expected) = found
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    gradients, expected = (np.concatenate([x.ravel() for x in jax.tree.leaves(g)]) for g in (gradients, expected))
    assert relative_error(gradients, expected) < 1e-4 and np.count_nonzero(expected)


def test_what_quantising_is_not_for(small, tmp_path):
    sd = StableDiffusion.from_config(small[0].root)
    with pytest.raises(ValueError, match="quantised='int4': choose from int8, fp8"):
        sd.quantise("int4")
    sd.quantise("fp8")
    with pytest.raises(ValueError, match="is quantised to fp8 already: load it anew"):
        sd.quantise("int8")
    with pytest.raises(ValueError, match="is quantised to fp8: merge LoRAs before"):
        sd.merge_loras([str(tmp_path)])
