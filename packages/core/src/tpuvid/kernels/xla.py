"""Attention in plain XLA, query chunk by query chunk, so that no T×S matrix ever exists. Runs everywhere; CPU's own."""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

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
    """As `attention_reference`; softmax statistics in float32, weights in the dtype of `value` for the second product."""
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
