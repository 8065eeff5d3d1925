"""JAX's own Pallas splash kernel, to compare with, lengths padded to whole blocks and padding masked exactly.

Paper: FlashAttention (arXiv:2205.14135); kernel: jax.experimental.pallas.ops.tpu.splash_attention.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Bool, Float

from tpuvid.compute.kernels.block_sizes import LANES, Blocks, round_up

BLOCKS = Blocks(q=2944, kv=2048, kv_compute=1024)
"""Wan 2.1 720p on v6e-8 (5 heads, S = 75,600, D = 128): predicted 41.6 ms per call by counting VLIW bundles without a mask
(2026-11; the 3328/2816/256 of earlier ports: 44.4 predicted, 43.93 measured)."""


def attention_splash(
    query: Float[Array, "B N T D"],
    key: Float[Array, "B N S D"],
    value: Float[Array, "B N S D"],
    *,
    kv_mask: Bool[Array, "B S"] | None = None,
    scale: float | None = None,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "B N T D"]:
    """What `attention_reference` computes with a mask over keys alone.

    `blocks`: by default `BLOCKS`, shrunk to the lengths and to VMEM. `interpret` runs the kernel on a CPU.
    """
    batch, heads, queries, dim = query.shape
    keys = key.shape[2]
    scale = dim**-0.5 if scale is None else scale
    blocks = blocks or _blocks(queries, keys, dim)
    # the kernel has no scale; folded into q in float32 so that bf16 rounds once
    query = _pad((query.astype(jnp.float32) * scale).astype(query.dtype), blocks.q)
    key, value = _pad(key, blocks.kv), _pad(value, blocks.kv)
    padded_q, padded_kv = query.shape[2], key.shape[2]

    mask = splash.MultiHeadMask([splash.FullMask((padded_q, padded_kv)) for _ in range(heads)])
    sizes = splash.BlockSizes(block_q=blocks.q, block_kv=blocks.kv, block_kv_compute=blocks.kv_compute)
    kernel = splash.make_splash_mha(mask=mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)

    if kv_mask is None and padded_kv == keys:
        out = jax.vmap(kernel)(query, key, value)
    else:
        # keys of another segment than the queries' take no weight: padding must not enter the softmax as e⁰
        valid = jnp.ones((batch, keys), bool) if kv_mask is None else jnp.broadcast_to(kv_mask, (batch, keys))
        foreign = jnp.pad(~valid, ((0, 0), (0, padded_kv - keys)), constant_values=True).astype(jnp.int32)
        segments = splash.SegmentIds(q=jnp.zeros((batch, padded_q), jnp.int32), kv=foreign)
        out = jax.vmap(kernel)(query, key, value, segments)
        # with no key left the kernel averages everything: such rows are zero by our definition
        out = jnp.where(valid.any(axis=1)[:, None, None, None], out, 0)
    return out[:, :, :queries, :dim].astype(query.dtype)


def _blocks(queries: int, keys: int, dim: int) -> Blocks:
    widths = round_up(dim) // LANES  # a VAE's single head has 384 or 1024 channels
    kv = min(round_up(BLOCKS.kv // widths), round_up(keys))
    compute = BLOCKS.kv_compute if kv % BLOCKS.kv_compute == 0 else LANES
    return Blocks(q=min(round_up(BLOCKS.q // widths), round_up(queries)), kv=kv, kv_compute=compute)


def _pad(x: Array, block: int) -> Array:
    """[B, N, T, D] with T and D zero-padded to whole blocks and lanes."""
    length, dim = -x.shape[2] % block, -x.shape[3] % LANES
    return jnp.pad(x, ((0, 0), (0, 0), (0, length), (0, dim)))
