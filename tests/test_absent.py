"""What the benchmark of absent chips reads in a compiled program's text, and counts in a traced program."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from benchmarks import arithmetic, hlo
from livo_jax import sharding
from livo_jax.models.attention import attention

# Of libtpu, for a TPU v5e; attributes that nobody here reads are cut out.
OF_TPU = """\
HloModule jit_f, is_scheduled=true

FileNames
1 "/checkout/livo_jax/models/layers.py"
2 "/usr/lib/python3/site-packages/flax/nnx/nn/linear.py"

FunctionNames
1 "<module>"
2 "Block.__call__.<locals>.body"
3 "Linear.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=15 end_line=15 column=2 end_column=23}
2 {file_name_id=1 function_name_id=2 line=10 end_line=10 column=24 end_column=27}
3 {file_name_id=2 function_name_id=3 line=300 end_line=300 column=15 end_column=28}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}


%fused_computation.1 (param_0.39: bf16[256,1024], param_1.36: bf16[1024,1024]) -> bf16[256,1024] {
  %param_0.39 = bf16[256,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_1.36 = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %convolution.9 = bf16[256,1024]{1,0:T(8,128)(2,1)} convolution(%param_0.39, %param_1.36), dim_labels=bf_io->bf, \
metadata={op_name="jit(f)/while/body/closed_call/dot_general" stack_frame_id=3}
  ROOT %tanh.4 = bf16[256,1024]{1,0:T(8,128)(2,1)S(1)} tanh(%convolution.9)
}

%body.2 (arg.0: (s32[], bf16[256,1024], bf16[1024,1024])) -> (s32[], bf16[256,1024], bf16[1024,1024]) {
  %one = s32[]{:T(128)} constant(1)
  %arg.0 = (s32[]{:T(128)}, bf16[256,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %gte.0 = s32[]{:T(128)} get-tuple-element(%arg.0), index=0
  %gte.1 = bf16[256,1024]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%arg.0), index=1
  %gte.2 = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%arg.0), index=2
  %add.2 = s32[]{:T(128)} add(%gte.0, %one)
  %fusion.2 = bf16[256,1024]{1,0:T(8,128)(2,1)S(1)} fusion(%gte.1, %gte.2), kind=kOutput, calls=%fused_computation.1, \
backend_config={"window_config":{"estimated_cycles":"8036"}}
  ROOT %tuple.17 = (s32[]{:T(128)}, bf16[256,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)}) \
tuple(%add.2, %fusion.2, %gte.2)
}

%condition.3 (arg.3: (s32[], bf16[256,1024], bf16[1024,1024])) -> pred[] {
  %constant.37 = s32[]{:T(128)} constant(7)
  %arg.3 = (s32[]{:T(128)}, bf16[256,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %gte.3 = s32[]{:T(128)} get-tuple-element(%arg.3), index=0
  ROOT %lt.0 = pred[]{:T(512)} compare(%gte.3, %constant.37), direction=LT
}

ENTRY %main.6 (q.1: bf16[2,8,1024,40]) -> (bf16[2,8,1024,40], f32[2,8,1024,128]) {
  %zero = s32[]{:T(128)} constant(0)
  %q.1 = bf16[2,8,1024,40]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %copy-start = (bf16[256,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[256,1024]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
copy-start(%q.1)
  %copy-done = bf16[256,1024]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %tuple.21 = (s32[]{:T(128)}, bf16[256,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)}) \
tuple(%zero, %copy-done, %copy-done)
  %while.1 = (s32[]{:T(128)}, bf16[256,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)}) \
while(%tuple.21), condition=%condition.3, body=%body.2, metadata={op_name="jit(f)/while" stack_frame_id=1}
  %flash_attention.1 = (bf16[2,8,1024,40]{3,2,1,0:T(8,128)(2,1)S(1)}, f32[2,8,1024,128]{3,2,1,0:T(8,128)S(1)}) \
custom-call(%q.1, %q.1), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/transpose(jvp())/jit(flash_attention)/pallas_call" stack_frame_id=2}
  %all-reduce-start = f32[2,1024]{1,0:T(2,128)} all-reduce-start(%q.1), to_apply=%region
  %transpose.1 = bf16[2,1024,8,40]{3,1,2,0:T(8,128)(2,1)} transpose(%q.1), dimensions={0,2,1,3}, \
metadata={op_name="jit(f)/transpose" stack_frame_id=2}, backend_config={"window_config":{"estimated_cycles":"500"}}
  %all-reduce-done = f32[2,1024]{1,0:T(2,128)} all-reduce-done(%all-reduce-start)
  %all-reduce.2 = f32[8]{0:T(128)} all-reduce(%zero), to_apply=%region
  ROOT %tuple.6 = (bf16[2,8,1024,40]{3,2,1,0}, f32[2,8,1024,128]{3,2,1,0}) tuple(%q.1, %flash_attention.1)
}

%region (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}
"""
ROW = 2 * 8 * 1024 * 128  # of a kernel's operand: 40 lie as 128


def test_a_tpu_s_text():
    work = hlo.read(OF_TPU)
    product, kernel, transpose = (
        next(x for x in work if x.name == name) for name in ("fusion.2", "flash_attention.1", "transpose.1")
    )
    # A loop's body counts as often as it runs; what has no origin has that of what is in it, outside of libraries.
    assert (product.kind, product.times, product.cycles) == ("matrix product", 7, 7 * 8036)
    assert (product.op, product.source) == ("dot_general", "models/layers.py:10 Block.__call__.body")
    assert product.in_memory == 0 and product.bytes == 256 * 1024 * 2
    assert (kernel.kind, kernel.cycles, kernel.backward) == ("kernel", None, True)
    assert kernel.bytes == 2 * ROW + 4 * ROW and [hlo.memory(shape)[0] for _, shape in kernel.operands] == [2 * ROW] * 2
    assert hlo.sizes(kernel.shape) == ((2, 8, 1024, 40), (2, 8, 1024, 128))
    assert (transpose.kind, transpose.op, transpose.backward) == ("other", "transpose", False)
    rows = hlo.dearest(work)
    assert [(row["cycles"], row["count"], row["kind"]) for row in rows] == [
        (7 * 8036, 7, "matrix product"),
        (500, 1, "other"),
    ]
    assert [(row["bytes"], row["count"], row["op"]) for row in hlo.buffers(work, ROW)] == [(2 * ROW, 1, "transpose")]
    (row,) = hlo.collectives(work)
    assert row == {
        "collective": "all-reduce",
        "count": 2,
        "bytes": (2 * 1024 + 128) * 4,
        "asynchronous": 1,
        "cycles_beside": 500,
    }


def test_a_loop_without_a_length_is_no_guess():
    with pytest.raises(ValueError, match="does not tell how often while.1 runs"):
        hlo.read(OF_TPU.replace("constant(7)", "constant({...})"))


def test_a_compiled_program():
    """A CPU's text, of the compiler that is here."""

    def body(x, _):
        return jnp.tanh(x @ x), None

    def f(x):
        return jax.lax.scan(body, x, length=5)[0].sum()

    compiled = jax.jit(jax.grad(f)).lower(jnp.ones((8, 8))).compile()
    products = [x for x in hlo.read(compiled.as_text()) if x.kind == "matrix product"]
    assert sum(x.times for x in products if not x.backward) == 5 and sum(x.times for x in products if x.backward) == 10
    assert {x.source.split(":")[0] for x in products} == {"tests/test_absent.py"}


def test_a_program_is_compiled_once(tmp_path):
    lowered = jax.jit(lambda x: x @ x).lower(jnp.ones((8, 8)))
    targets = ("here", "here", "there")
    first, again, other = (hlo.compile_once(lowered, target, tmp_path, tmp_path) for target in targets)
    assert [there for _, there in (first, again, other)] == [False, True, False]
    told = first[0]
    assert again[0] == told and told["arguments"] == 8 * 8 * 4 and "ENTRY" in told["text"] and not told["bundles"]


OF_KERNEL = """\
LB: loop body

     0   :  { %s1_s1 = smov.u32 0 }
   0x1   :  { %s2_s2 = smov.u32 0 }
   0x2 LB: > { %s3_s3 = sadd.s32 1, %s1_s1 }
   0x3   : > { %40 = sbr.rel (%p5_p1) target = $region16 }
   0x4   :  {}
   0x5 LB: >> { %v91_v0 = vld [vmem:[%s7_s2] sm:$0xff] }
   0x6   : >> { %p1_p1 = scmp.ge.s32.totalorder %s4_s3, 8 /* loop exit test */  ;;  %s5 = smov.u32 1 }
   0x7   : > { %p7_p2 = scmp.ge.s32.totalorder %s3_s3, 326 /* loop exit test */ }
   0x8   :  {} /* End region 4 */
   0x9   :  { %50 = sbr.rel (!%p7_p2) target = $region190 }
   0xa   : > { %s154772_s28 = smov.u32 %s154768_s7 }
   0xb   :  { %2413 = vsyncpa [#allocation6], 1 }
"""


def test_the_bundles_of_a_program(tmp_path):
    assert hlo.bundles(OF_KERNEL) == 5 + 326 * (5 + 8 * 2), "what waits for a branch may not say what it is in"
    (tmp_path / "17-splash_fwd.1-01-final_bundles.txt").write_text(OF_KERNEL.replace("%s4_s3, 8", "%s4_s3, %s9_s9"))
    (tmp_path / "17-splash_fwd.1-00-schedule-analysis_final_bundles.txt").write_text("Schedule analysis:")
    assert hlo.read_bundles(tmp_path) == {"splash_fwd.1": None}, "no loop's length is guessed"


@pytest.mark.parametrize("strides, groups", [(1, 1), (2, 1), (1, 2)])
def test_convolutions_and_their_gradients(strides, groups):
    x, kernel, side = jnp.ones((2, 9, 9, 4)), jnp.ones((3, 3, 4 // groups, 6)), (9 - 3) // strides + 1

    def loss(x, kernel):
        settings = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups)
        return (jax.lax.conv_general_dilated(x, kernel, (strides, strides), "VALID", **settings) ** 2).sum()

    jaxpr = jax.jit(jax.grad(loss, (0, 1))).trace(x, kernel).jaxpr.jaxpr
    forward = 2 * (2 * side * side * 6) * 9 * (4 // groups)  # as many for the gradient of the kernel
    of_input = 2 * (2 * 9 * 9 * 4) * 9 * (6 // groups) // strides**2
    assert arithmetic.flops(jaxpr, "cpu") == 2 * forward + of_input


def test_products_of_batches_in_loops():
    x = jnp.ones((5, 3, 7, 7))

    def f(x):
        return jax.lax.scan(lambda y, _: (y @ x, None), x, length=4)[0].sum()

    jaxpr = jax.jit(jax.grad(f)).trace(x).jaxpr.jaxpr
    assert arithmetic.flops(jaxpr, "cpu") == 4 * 3 * 2 * 15 * 7**3
    assert arithmetic.flops(jaxpr, "cpu", unit=8) == 4 * 3 * 2 * 15 * 8**3


def test_kernels():
    """Two products of the flash attention forward and five backward; heads of 40 fill a unit of 128 in part."""
    B, L, S, N, K = 2, 512, 1024, 2, 40
    mesh = jax.make_mesh((2, 1, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:4])
    q, k = (jnp.ones((B, n, N * K), jnp.bfloat16) for n in (L, S))

    def loss(q, k):
        return attention(q, k, k, N).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        jaxpr = jax.jit(jax.grad(loss, (0, 1))).trace(q, k).jaxpr.jaxpr
    product = 2 * B * N * L * S * K
    of_vectors = 2 * B * N * L * K  # the outputs and their gradients
    assert arithmetic.flops(jaxpr, "tpu") == (2 + 5) * product + of_vectors
    assert arithmetic.flops(jaxpr, "tpu", unit=128) == (2 + 5) * product * 128 // 40 + of_vectors
    kernels = arithmetic.kernels(jaxpr, "tpu")
    assert len(kernels) == 2 and all((1, L, K) in arguments for arguments, _ in kernels)
    assert sum(arithmetic.flops_of(x, "tpu") for x in kernels.values()) == (2 + 5) * product // 4
    assert not arithmetic.kernels(jaxpr, "cpu")
    assert arithmetic.flops(jaxpr, "cpu") >= 7 * product
