"""Attention: one function, a kernel for each platform, the same numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from livo_jax import sharding
from livo_jax.models.attention import _filled_length, _flash, _flash_on_mesh, attention
from tests.conftest import relative_error

B, L, HEADS, K = 2, 256, 2, 40


def qkv(keys=L, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((B, n, HEADS * K)), dtype) for n in (L, keys, keys)]


def gradients(attend, arrays):
    """Of a sum that weighs every output differently."""
    weights = jnp.arange(1, 1 + arrays[0].size).reshape(arrays[0].shape) / arrays[0].size
    return jax.jit(jax.grad(lambda *qkv: (attend(*qkv) * weights).astype(jnp.float32).sum(), (0, 1, 2)))(*arrays)


@pytest.mark.parametrize("case", ["self", "masked", "causal"])
def test_numbers_are_pytorchs(case):
    arrays = qkv(77 if case == "masked" else L)
    mask = np.ones((B, arrays[1].shape[1]), bool)
    mask[:, 0], mask[1, 60:] = False, False
    options = {"self": {}, "masked": {"mask": mask}, "causal": {"causal": True}}[case]
    theirs = [torch.tensor(np.asarray(x).reshape(B, -1, HEADS, K)).transpose(1, 2).requires_grad_() for x in arrays]
    shown = torch.tensor(mask)[:, None, None] if case == "masked" else None
    out = torch.nn.functional.scaled_dot_product_attention(*theirs, attn_mask=shown, is_causal=case == "causal")
    out = out.transpose(1, 2).reshape(B, L, -1)
    (out * torch.arange(1, 1 + out.numel()).reshape(out.shape) / out.numel()).sum().backward()
    attend = functools.partial(attention, heads=HEADS, **options)
    assert relative_error(attend(*arrays), out.detach()) < 1e-5
    for ours, x in zip(gradients(attend, arrays), theirs):
        assert relative_error(ours, x.grad.transpose(1, 2).reshape(ours.shape)) < 1e-5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_probabilities_are_kept(dtype):

    def forward(*qkv):
        return jax.vjp(functools.partial(attention, heads=HEADS), *qkv)[1]

    kept = jax.make_jaxpr(forward)(*qkv(dtype=dtype)).jaxpr.outvars
    assert max(v.aval.size for v in kept) <= B * L * HEADS * K < B * HEADS * L * L


@pytest.fixture
def cudnn_is_there(monkeypatch):
    """jax asks the installed library for its version; the kernel's rules and lowering are jax's own."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91002)


def kernels(platform, arrays, **options) -> list[str]:
    """The kernels in the attention and its gradient, lowered for a platform that is not here."""
    mesh = jax.make_mesh((1, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])

    def loss(*qkv):
        return attention(*qkv, heads=HEADS, **options).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    return [name for name in ("cudnn", "tpu_custom_call") if name in text]


def test_each_platform_has_its_kernel(cudnn_is_there):
    half, whole = qkv(dtype=jnp.bfloat16), qkv()
    assert kernels("cuda", half) == ["cudnn"] and kernels("tpu", half) == ["tpu_custom_call"]
    assert kernels("cpu", half) == kernels("rocm", half) == []
    assert kernels("cuda", whole) == kernels("tpu", whole) == []
    assert kernels("cuda", qkv(78, jnp.bfloat16)) == ["cudnn"]
    assert kernels("cuda", qkv(77, jnp.bfloat16)) == kernels("tpu", qkv(78, jnp.bfloat16)) == []
    joint = qkv(333, jnp.bfloat16)[1:]  # of no length that a kernel takes: filled up
    assert kernels("cuda", [joint[0], *joint]) == ["cudnn"] and kernels("tpu", [joint[0], *joint]) == [
        "tpu_custom_call"
    ]
    masked = {"mask": jnp.ones((B, L), bool)}
    assert kernels("cuda", half, **masked) == [] and kernels("tpu", half, **masked) == ["tpu_custom_call"]
    assert kernels("tpu", qkv(128, jnp.bfloat16), mask=jnp.ones((B, 128), bool)) == [], "keys that are no queries"
    wide = [jnp.zeros((B, L, HEADS * 512), jnp.bfloat16)] * 3  # as the VAE's
    assert kernels("cuda", wide) == kernels("tpu", wide) == []


def test_without_cudnn_there_is_xla():
    assert kernels("cuda", qkv(dtype=jnp.bfloat16)) == []


@pytest.mark.parametrize(
    "tokens, length",
    [(4429, 4608), (4032, 4096), (2304, 2304), (1000, 1024), (4480, 4608), (576, 640), (333, 384), (256, 256)],
)
def test_blocks_are_large_where_that_adds_little(tokens, length):
    """Of 512, 256 or 128 tokens, for a sixteenth more at most: 576 would be 1,024 or 768."""
    assert _filled_length(tokens) == length


@pytest.mark.parametrize("length, masked, held", [(L, False, L), (L, True, L), (200, False, L), (300, True, 128)])
def test_the_tpu_kernel_computes_the_same(length, masked, held, monkeypatch):
    """In its interpreter, which runs anywhere; of a length that is filled up, with keys hidden in each row, and of more
    keys than a core holds, too.
    """
    monkeypatch.setattr("livo_jax.models.attention.HELD", held)
    q, k = qkv(length)[1:]
    arrays = [q, k, q[:, ::-1]]
    mask = jnp.ones((B, length), bool).at[0, 3].set(False).at[1, 150:].set(False) if masked else None

    def flash(*qkv):
        return _flash(*(x.reshape(B, length, HEADS, K) for x in qkv), mask).reshape(B, length, HEADS * K)

    with pltpu.force_tpu_interpret_mode():
        found = [flash(*arrays), *gradients(flash, arrays)]
    attend = functools.partial(attention, heads=HEADS, mask=mask)
    for ours, plain in zip(found, [attend(*arrays), *gradients(attend, arrays)]):
        assert relative_error(ours, plain) < 1e-5


def test_a_mask_is_divided_as_rows_are():
    arrays, mask = qkv(), jnp.ones((B, L), bool).at[1, 100:].set(False)
    mesh = jax.make_mesh((B, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:B])
    with jax.set_mesh(mesh), pltpu.force_tpu_interpret_mode():
        ours = jax.jit(_flash_on_mesh)(*(x.reshape(B, L, HEADS, K) for x in arrays), mask)
    assert relative_error(ours.reshape(B, L, -1), attention(*arrays, HEADS, mask)) < 1e-5
