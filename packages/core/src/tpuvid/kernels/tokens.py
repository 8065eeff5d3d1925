"""Attention of tokens that are split over the mesh axis ``sp``, inside `shard_map`.

Source: DeepSpeed-Ulysses (arXiv:2309.14509).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from tpuvid.kernels.attention import attention, local_attention
from tpuvid.kernels.block_sizes import LANES
from tpuvid.kernels.placement import placement

AXIS = "sp"
SUBLANES = 8
"""A part's tokens come in multiples of it, all parts' together of `LANES`: what a TPU's registers hold."""


def padded_length(length: int, parts: int) -> int:
    """The least length that is whole registers in every part, and together."""
    whole = math.lcm(parts * SUBLANES, LANES)
    return -(-length // whole) * whole


class Stream(NamedTuple):
    """Tokens of one kind that take part in an attention: a video's, a prompt's."""

    name: str
    """Of the argument of the block that they are."""
    query: Float[Array, "B N T D"]
    key: Float[Array, "B N T D"]
    value: Float[Array, "B N T D"]
    mask: Bool[Array, "B T"] | None = None
    """True where a key counts."""


def token_attention(streams: Sequence[Stream], *, scale: float | None = None) -> list[Float[Array, "B N T D"]]:
    """Attention of all tokens to all tokens, those of all parts included; what each stream's queries get.

    Where the heads divide, an all-to-all brings each part all tokens of its share of the heads, and another brings the
    result back; else keys and values are gathered. Which token stands where doesn't matter to attention, so the
    streams are joined within each part.
    """
    query, key, value = (jnp.concatenate([s[field] for s in streams], axis=2) for field in (1, 2, 3))
    masks = [_mask(stream) for stream in streams]
    mask = None
    if any(m is not None for m in masks):
        batch = len(query)
        all_ones = [jnp.ones((batch, s.key.shape[2]), bool) if m is None else m for s, m in zip(streams, masks)]
        mask = jnp.concatenate([jnp.broadcast_to(m, (batch, m.shape[1])) for m in all_ones], axis=1)
    split = placement().tokens
    if split is None:
        out = attention(query, key, value, mask=None if mask is None else mask[:, None, None], scale=scale)
    else:
        mask = None if mask is None else lax.all_gather(mask, AXIS, axis=1, tiled=True)
        if query.shape[1] % split.parts == 0:
            query, key, value = (_all_tokens(x, split.parts) for x in (query, key, value))
            out = _all_heads(local_attention(query, key, value, mask, scale), split.parts)
        else:
            key, value = (lax.all_gather(x, AXIS, axis=2, tiled=True) for x in (key, value))
            out = local_attention(query, key, value, mask, scale)
    ends = [0]
    for stream in streams:
        ends.append(ends[-1] + stream.query.shape[2])
    return [out[:, :, start:end] for start, end in zip(ends, ends[1:])]


def _all_tokens(x: Float[Array, "B N T D"], parts: int) -> Float[Array, "B n T2 D"]:
    """Of all parts, for a share of the heads. What is exchanged is a leading axis: any other costs copies on both sides."""
    batch, heads, tokens, dim = x.shape
    shares = jnp.moveaxis(x.reshape(batch, parts, heads // parts, tokens, dim), 1, 0)
    found = lax.all_to_all(shares, AXIS, 0, 0, tiled=True)  # [part, B, n, T, D]
    return jnp.moveaxis(found, 0, 2).reshape(batch, heads // parts, parts * tokens, dim)


def _all_heads(x: Float[Array, "B n T2 D"], parts: int) -> Float[Array, "B N T D"]:
    """The inverse of `_all_tokens`."""
    batch, heads, tokens, dim = x.shape
    found = lax.all_to_all(jnp.moveaxis(x.reshape(batch, heads, parts, tokens // parts, dim), 2, 0), AXIS, 0, 0, tiled=True)
    return jnp.moveaxis(found, 0, 1).reshape(batch, parts * heads, tokens // parts, dim)


def _mask(stream: Stream) -> Bool[Array, "B T"] | None:
    """The stream's own, and without the tokens that only pad its last part."""
    split, count = placement().tokens, stream.key.shape[2]
    if split is None or split.lengths[stream.name] == count * split.parts:
        return stream.mask
    place = lax.axis_index(AXIS) * count + jnp.arange(count)
    real = (place < split.lengths[stream.name])[None]
    return real if stream.mask is None else stream.mask & real
