"""Attention in plain XLA, query chunk by query chunk, so that no T×S matrix ever exists. Runs everywhere; CPU's own."""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from tpuvid.compute.kernels.block_sizes import LANES
from tpuvid.compute.kernels.window import Band

SCORE_BYTES = 64 * 2**20
"""Scores held at a time: large enough to keep the cores busy, small next to any model."""


def attention_xla(
    query: Float[Array, "B N T D"],
    key: Float[Array, "B N S D"],
    value: Float[Array, "B N S D"],
    *,
    mask: Bool[Array, "#B #N #T #S"] | Float[Array, "#B #N #T #S"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B N T D"]:
    """What `attention_reference` computes; softmax statistics in float32, weights in the dtype of `value` for the second
    product."""
    batch, heads, length, dim = query.shape
    scale = dim**-0.5 if scale is None else scale
    chunks = min(length, math.ceil(batch * heads * length * key.shape[2] * 4 / SCORE_BYTES))
    if chunks <= 1:
        return _attend(query, key, value, mask, scale)
    size = math.ceil(length / chunks)
    padding = size * chunks - length

    def split(x: Array) -> Array:
        """[B, N, T, …] → [chunks, B, N, size, …]"""
        x = jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0)))
        return jnp.moveaxis(x.reshape(*x.shape[:2], chunks, size, x.shape[-1]), 2, 0)

    if mask is None or mask.shape[2] == 1:
        out = jax.lax.map(lambda q: _attend(q, key, value, mask, scale), split(query))
    else:
        out = jax.lax.map(lambda qm: _attend(qm[0], key, value, qm[1], scale), (split(query), split(mask)))
    return jnp.moveaxis(out, 0, 2).reshape(batch, heads, chunks * size, dim)[:, :, :length]


def attention_xla_windowed(
    query: Float[Array, "B N T D"],
    key: Float[Array, "B N S D"],
    value: Float[Array, "B N S D"],
    band: Band,
    *,
    kv_mask: Bool[Array, "B S"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B N T D"]:
    """What `attention_reference` computes with `Band.mask` and a mask over keys; what no query of a few neighbours sees isn't
    touched."""
    batch, heads, length, dim = query.shape
    (run, reach), places = band.window, band.places
    kept = jnp.ones((batch, key.shape[2]), bool) if kv_mask is None else jnp.broadcast_to(kv_mask, (batch, key.shape[2]))
    size = min(length, max(run, LANES))
    span = min(places, (2 * reach + 1 + math.ceil((size - 1) / run)) * run)
    chunks = math.ceil(length / size)
    query = jnp.pad(query, ((0, 0), (0, 0), (0, chunks * size - length), (0, 0)))

    def attend(chunk: Array) -> Array:
        start = band.part * length + chunk * size
        first = jnp.clip((start // run - reach) * run, 0, places - span)

        def seen(x: Array, axis: int) -> Array:
            """The keys (along `axis` of `x`) in the span around the chunk, and those that all see."""
            rest = jax.lax.slice_in_dim(x, places, x.shape[axis], axis=axis)
            return jnp.concatenate([jax.lax.dynamic_slice_in_dim(x, first, span, axis), rest], axis)

        runs = (start + jnp.arange(size)) // run
        near = jnp.abs(runs[:, None] - (first + jnp.arange(span)) // run) <= reach
        near = jnp.pad(near, ((0, 0), (0, key.shape[2] - places)), constant_values=True)
        mask = near[None, None] & seen(kept, 1)[:, None, None]
        here = jax.lax.dynamic_slice_in_dim(query, chunk * size, size, 2)
        return attention_xla(here, seen(key, 2), seen(value, 2), mask=mask, scale=scale)

    out = jax.lax.map(attend, jnp.arange(chunks))
    return jnp.moveaxis(out, 0, 2).reshape(batch, heads, chunks * size, dim)[:, :, :length]


def _attend(query, key, value, mask, scale):
    precision = "highest" if query.dtype == jnp.float32 else None
    scores = jnp.einsum("bntd,bnsd->bnts", query, key, precision=precision, preferred_element_type=jnp.float32) * scale
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf) if mask.dtype == bool else scores + mask.astype(jnp.float32)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))  # -inf − -inf would be NaN in a fully masked row
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum(
        "bnts,bnsd->bntd", weights.astype(value.dtype), value, precision=precision, preferred_element_type=jnp.float32
    )
    return (out / jnp.where(total == 0, 1.0, total)).astype(query.dtype)
