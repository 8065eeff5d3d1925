"""Rotary embedding of pairs of neighbouring channels, in float32, from [B, T, N·D] to heads first, in one pass.

XLA takes pairs of lanes apart through arrays in HBM: for Wan 2.1 720p on v6e-8 that was 0.3 s of a 3.7 s step (predicted).
Paper: RoFormer (arXiv:2104.09864).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from tpuvid.compute.kernels.block_sizes import LANES
from tpuvid.compute.kernels.placement import placement

BLOCK = 256
"""Tokens at a time: 256 × 5,120 channels in and out take 10 MiB of VMEM, twice for the pipeline."""


def rotate_heads(x: Float[Array, "B T C"], cosines: Float[Array, "T D"], sines: Float[Array, "T D"]) -> Float[Array, "B N T D"]:
    """Channels 2i and 2i + 1 of every head turned by the angles of a token; both have the same entry in the tables.

    On a TPU, inside `shard_map` or on one device, by a kernel where heads are whole lanes.
    """
    place, dim = placement(), cosines.shape[-1]
    alone = place.tokens is not None or place.mesh is None or place.mesh.size == 1
    if place.platform == "tpu" and alone and dim % LANES == 0:
        return rotate_heads_pallas(x, cosines, sines)
    heads = x.reshape(*x.shape[:2], -1, dim)
    turned = jnp.stack([-heads[..., 1::2], heads[..., ::2]], axis=-1).reshape(heads.shape)
    cosines, sines = (table.astype(jnp.float32)[None, :, None] for table in (cosines, sines))
    return jnp.swapaxes((heads * cosines + turned * sines).astype(x.dtype), 1, 2)


def rotate_heads_pallas(
    x: Float[Array, "B T C"], cosines: Float[Array, "T D"], sines: Float[Array, "T D"], *, interpret: bool = False
) -> Float[Array, "B N T D"]:
    """`rotate_heads` as a kernel."""
    batch, tokens, channels = x.shape
    dim = cosines.shape[-1]
    heads = channels // dim
    block = min(BLOCK, tokens)
    signed = sines.astype(jnp.float32) * jnp.where(jnp.arange(dim) % 2 == 0, -1, 1)
    return pl.pallas_call(
        functools.partial(_kernel, heads=heads, dim=dim),
        grid=(batch, pl.cdiv(tokens, block)),
        in_specs=[
            pl.BlockSpec((None, block, channels), lambda b, i: (b, i, 0)),
            *[pl.BlockSpec((block, dim), lambda b, i: (i, 0))] * 2,
        ],
        out_specs=pl.BlockSpec((None, heads, block, dim), lambda b, i: (b, 0, i, 0)),
        out_shape=jax.ShapeDtypeStruct((batch, heads, tokens, dim), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=2 * x.nbytes + 2 * signed.nbytes),
        interpret=interpret,
        name="rotate_heads",
    )(x, cosines.astype(jnp.float32), signed)


def _kernel(x_ref, cos_ref, sin_ref, out_ref, *, heads: int, dim: int) -> None:
    cosines, sines = cos_ref[...], sin_ref[...]
    even = jax.lax.broadcasted_iota(jnp.int32, cosines.shape, 1) % 2 == 0
    for head in range(heads):
        x = x_ref[:, head * dim : (head + 1) * dim].astype(jnp.float32)
        turned = jnp.where(even, pltpu.roll(x, dim - 1, 1), pltpu.roll(x, 1, 1))
        out_ref[head] = (x * cosines + turned * sines).astype(out_ref.dtype)
