"""Scaled dot-product attention, by the kernel that the platform has."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

BLOCK = 128  # queries and keys of Pallas' splash attention come in multiples of it
BLOCKS = (512, 256, BLOCK)  # of queries, in a step of its grid; 128 are too little work
HELD = 4096  # so many keys, and as many values, are held by a TPU core at once


def attention(q, k, v, heads: int, mask=None, causal: bool = False, bias=None, scale: float | None = None):
    """Multi-head scaled dot-product attention; no probabilities are kept for the backward pass.

    Half precision without a mask and a bias takes the flash attention (Dao et al. 2022) of cuDNN on an NVIDIA GPU and
    of Pallas on a TPU, where these take the shapes; on a TPU also with a mask of self-attention. The platform is known,
    and the kernel chosen, when a program is lowered.

    Args:
        q: [B, L, D] queries. k, v: [B, S, D] keys and values.
        heads: number of heads; divides D.
        mask: [B, S] bool, False where a key is hidden, or None.
        causal: whether query l sees keys 0..l only.
        bias: [1, heads, L, S], added to the products of queries and keys, or None.
        scale: of these products, before; 1 / sqrt(D / heads) if None.

    Returns:
        [B, L, D] in q's dtype.
    """
    shape = q.shape
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))  # [B, L, N, K]
    shown = None if mask is None else mask[:, None, None, :]  # [B, N, L, S]
    settings = dict(mask=shown, is_causal=causal, bias=bias, scale=scale)
    plain = jax.checkpoint(functools.partial(jax.nn.dot_product_attention, **settings))
    fused = {}
    if bias is None and scale is None and q.dtype in (jnp.bfloat16, jnp.float16):
        cudnn = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
        if q.shape[1] == k.shape[1] > BLOCK and q.shape[1] % 2:
            cudnn = functools.partial(_cudnn_of_odd, is_causal=causal)
        if mask is None and _takes(cudnn, q, k, v):
            fused["cuda"] = cudnn
        flash = functools.partial(_flash_on_mesh, mask=mask)
        if not causal and (mask is None or q.shape[1] == k.shape[1]) and _takes(flash, q, k, v):
            fused["tpu"] = flash
    out = jax.lax.platform_dependent(q, k, v, default=plain, **fused) if fused else plain(q, k, v)
    return out.reshape(shape)


def _filled_up(length: int, q, k, v):
    """q, k, v [B, L, N, K] with zeros up to so many tokens: the kernels take few lengths."""
    return (jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))) for x in (q, k, v))


def _cudnn_of_odd(q, k, v, is_causal):
    """cuDNN's attention of L queries and keys, L odd, which it does not take: one more, which nobody sees."""
    B, L = q.shape[:2]
    lengths = jnp.full(B, L, jnp.int32)
    settings = dict(query_seq_lengths=lengths, key_value_seq_lengths=lengths, is_causal=is_causal)
    return jax.nn.dot_product_attention(*_filled_up(L + 1, q, k, v), implementation="cudnn", **settings)[:, :L]


def _takes(kernel, *args) -> bool:
    """Whether a kernel is there and takes such arguments and their gradients, by its own checks."""
    try:
        jax.eval_shape(lambda *args: jax.vjp(kernel, *args)[0], *args)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _flash_on_mesh(q, k, v, mask=None):
    """Pallas' flash attention on the ambient mesh, rows divided over its first axes and heads over its last.

    Raises NotImplementedError for shapes that it does not take, and without a mesh, over which nobody could divide it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise NotImplementedError
    *rows, heads = mesh.axis_names
    B, L, N, K = q.shape
    parts = math.prod(mesh.shape[axis] for axis in rows)
    fits = L % BLOCK == k.shape[1] % BLOCK == 0 or L == k.shape[1] > BLOCK  # of self-attention any length is filled up
    if K > 128 or not fits or B % parts or N % mesh.shape[heads]:
        raise NotImplementedError
    spec = PartitionSpec(rows, None, heads)
    arrays, specs = (q, k, v), (spec,) * 3
    if mask is not None:
        arrays, specs = (*arrays, mask), (*specs, PartitionSpec(rows))
    return jax.shard_map(_flash, in_specs=specs, out_specs=spec, check_vma=False)(*arrays)


def _filled_length(L: int) -> int:
    """The length that L tokens are filled up to: of the largest blocks that add a sixteenth at most."""
    for block in BLOCKS:
        length = -(-L // block) * block
        if 16 * (length - L) <= L:
            break
    return length


def _flash(q, k, v, mask=None):
    """[B, L, N, K] from q [B, L, N, K] and k, v [B, S, N, K]; L and S are multiples of 128, or equal.

    mask: [B, S] bool, False where a key is hidden, or None; with one L and S are equal.

    Splash attention's backward pass is one kernel, which makes the probabilities once, and reads a row's sums as
    they are: that of jax.experimental.pallas.ops.tpu.flash_attention is two, and reads a copy of them for each key of
    a block.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    (B, L, N, K), seen = q.shape, None
    filled = _filled_length(L) if L == k.shape[1] else L
    if filled > L:
        q, k, v = _filled_up(filled, q, k, v)
    S = k.shape[1]
    if filled > L or mask is not None:  # what is filled up, or hidden, is a segment that no query of the others sees
        there = jnp.arange(filled) < L
        shown = there if mask is None else jnp.pad(mask, ((0, 0), (0, filled - L)))
        seen = splash.SegmentIds(*(x.astype(jnp.int32) for x in (jnp.broadcast_to(there, shown.shape), shown)))
    heads = (B * N,) if mask is None else (B, N)  # without a mask rows are as heads are: all see the same keys
    q, k, v = (x.swapaxes(1, 2).reshape(*heads, -1, K) for x in (q * K**-0.5, k, v))
    block_q, block_k = math.gcd(BLOCKS[0], filled), math.gcd(256, S)
    # The fewer blocks of keys, the fewer steps; and the backward kernel writes a gradient of all queries for each.
    held = max(size for size in range(block_k, min(S, HELD) + 1, block_k) if S % size == 0)
    sizes = splash.BlockSizes(
        block_q=block_q, block_kv=held, block_kv_compute=block_k,
        block_q_dkv=block_q, block_kv_dkv=held, block_kv_dkv_compute=block_k, use_fused_bwd_kernel=True,
    )  # fmt: skip
    full = splash.MultiHeadMask([splash.FullMask((filled, S))])
    kernel = splash.make_splash_mha(full, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    # A core takes one step of a grid after another: rows in a loop, for the interpreter does not know a batched grid.
    out = kernel(q, k, v, seen) if mask is None else jax.lax.map(lambda row: kernel(*row), (q, k, v, seen))
    return out.reshape(B, N, filled, K).swapaxes(1, 2)[:, :L]
