"""Attention as the formula says it: the oracle that every backend is tested against. Builds T×S scores; for tests only."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float


def attention_reference(
    query: Float[Array, "B N T D"],
    key: Float[Array, "B N S D"],
    value: Float[Array, "B N S D"],
    *,
    mask: Bool[Array, "#B #N #T #S"] | Float[Array, "#B #N #T #S"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B N T D"]:
    """softmax(scale · q kᵀ + mask) v in float32. A boolean mask keeps where true; a row with nothing to keep gives zeros."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.astype(jnp.float32) for x in (query, key, value))
    scores = jnp.einsum("bntd,bnsd->bnts", q, k, precision="highest") * scale
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf) if mask.dtype == bool else scores + mask.astype(jnp.float32)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("bnts,bnsd->bntd", weights / jnp.where(total == 0, 1.0, total), v, precision="highest")
    return out.astype(query.dtype)
