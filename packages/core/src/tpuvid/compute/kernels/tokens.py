"""Attention of tokens that are split over the mesh axis ``sp``, inside `shard_map`.

Source: DeepSpeed-Ulysses (arXiv:2309.14509).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float

from tpuvid.compute.kernels.attention import attention
from tpuvid.compute.kernels.block_sizes import LANES
from tpuvid.compute.kernels.placement import SP, placement
from tpuvid.compute.kernels.window import Band

VIDEO = "hidden_states"
"""The stream that windows are about: what diffusers' blocks call the tokens of a video, which stand frame by frame."""
SUBLANES = 8
"""A part's tokens come in multiples of it, all parts' together of `LANES`: what a TPU's registers hold."""


def padded_length(length: int, parts: int) -> int:
    """The least length that is whole registers in every part, and together."""
    whole = math.lcm(parts * SUBLANES, LANES)
    return -(-length // whole) * whole


class Stream(NamedTuple):
    """Tokens of one kind that take part in an attention: a video's, a prompt's."""

    name: str
    """The name of the block's argument that holds these tokens."""
    query: Float[Array, "B N T D"]
    key: Float[Array, "B N T D"]
    value: Float[Array, "B N T D"]
    mask: Bool[Array, "B S"] | None = None
    """True where a key counts; of all parts' tokens, and so the same in each."""


def token_attention(streams: Sequence[Stream], *, scale: float | None = None) -> list[Float[Array, "B N T D"]]:
    """Attention of all tokens to all tokens, those of all parts included; what each stream's queries get.

    Which token stands where doesn't matter to attention, so the streams are joined within each part. Under an
    `attention_window` it matters for the stream `VIDEO`, whose tokens see each other through the window; all else sees all.
    """
    split, window = placement().tokens, placement().window
    exchange = Exchange(1 if split is None else split.parts, streams[0].query.shape[1])
    apart = [s for s in streams if window is not None and s.name == VIDEO]
    others = [s for s in streams if window is None or s.name != VIDEO]
    groups = [group for group in (apart, others) if group]
    joined = [exchange.all_tokens(_joined(group)) for group in groups]
    key, value = (jnp.concatenate(parts, axis=2) for parts in ([s.key for s in joined], [s.value for s in joined]))
    mask = _mask(groups)
    mask = None if mask is None else mask[:, None, None]
    found: dict[str, Array] = {}
    for group, stream in zip(groups, joined, strict=True):
        band = None
        if window is not None and group is apart:
            band = Band(window, stream.key.shape[2], *exchange.part_of_queries())
        out = exchange.all_heads(attention(stream.query, key, value, mask=mask, band=band, scale=scale))
        ends = itertools.accumulate((s.query.shape[2] for s in group), initial=0)
        found |= {s.name: out[:, :, start:end] for s, (start, end) in zip(group, itertools.pairwise(ends), strict=True)}
    return [found[s.name] for s in streams]


@dataclass(frozen=True)
class Exchange:
    """How parts that have some tokens for all heads come to have all tokens for some heads, and back.

    Heads are dealt out among as many neighbouring parts as divide them (an all-to-all, Ulysses); where those aren't all
    parts, each gathers the keys and values that parts elsewhere have for the same heads, and keeps the queries it has.
    """

    parts: int
    heads: int

    @property
    def ways(self) -> int:
        """How many parts the heads are dealt out among."""
        return math.gcd(self.heads, self.parts)

    def part_of_queries(self) -> tuple[int, int | Array]:
        """How many parts all queries are still in, and which one is here."""
        parts = self.parts // self.ways
        return parts, lax.axis_index(SP) // self.ways if parts > 1 else 0

    def all_tokens(self, stream: Stream) -> Stream:
        """Keys and values of all parts."""
        query, key, value = (self._deal(x) for x in (stream.query, stream.key, stream.value))
        return Stream(stream.name, query, self._gather(key), self._gather(value))

    def all_heads(self, x: Float[Array, "B n T2 D"]) -> Float[Array, "B N T D"]:
        """What the queries of `all_tokens` got, back where they came from."""
        if self.ways == 1:
            return x
        batch, heads, tokens, dim = x.shape
        shares = jnp.moveaxis(x.reshape(batch, heads, self.ways, tokens // self.ways, dim), 2, 0)
        return jnp.moveaxis(self._to_each(shares), 0, 1).reshape(batch, self.heads, tokens // self.ways, dim)

    def _deal(self, x: Float[Array, "B N T D"]) -> Float[Array, "B n T2 D"]:
        if self.ways == 1:
            return x
        batch, heads, tokens, dim = x.shape
        shares = jnp.moveaxis(x.reshape(batch, self.ways, heads // self.ways, tokens, dim), 1, 0)
        return jnp.moveaxis(self._to_each(shares), 0, 2).reshape(batch, heads // self.ways, self.ways * tokens, dim)

    def _to_each(self, shares: Float[Array, "ways ..."]) -> Float[Array, "ways ..."]:
        """A share to each of the parts that deal out heads. It is a leading axis: any other costs copies on both sides."""
        groups = np.arange(self.parts).reshape(-1, self.ways).tolist()
        return lax.all_to_all(shares, SP, 0, 0, tiled=True, axis_index_groups=groups)

    def _gather(self, x: Float[Array, "B n T D"]) -> Float[Array, "B n S D"]:
        """The tokens of all parts that have the same heads."""
        if self.ways == self.parts:
            return x
        groups = np.arange(self.parts).reshape(-1, self.ways).T.tolist()
        return lax.all_gather(x, SP, axis=2, tiled=True, axis_index_groups=groups)


def _joined(streams: Sequence[Stream]) -> Stream:
    """The streams one after the other, in each part."""
    each = [s.query for s in streams], [s.key for s in streams], [s.value for s in streams]
    query, key, value = (jnp.concatenate(parts, axis=2) for parts in each)
    return Stream(streams[0].name, query, key, value)


def _mask(groups: Sequence[Sequence[Stream]]) -> Bool[Array, "B S"] | None:
    """Which keys count, once those of all parts are here: not what pads the last part. None where all do."""
    split = placement().tokens
    if all(s.mask is None and (split is None or split.padding(s.name, s.key.shape[2]) == 0) for g in groups for s in g):
        return None
    parts = 1 if split is None else split.parts

    def by_part(stream: Stream) -> Bool[Array, "B P T"]:
        count = stream.key.shape[2]
        length = parts * count if split is None else split.lengths[stream.name]
        mask = jnp.ones((1, length), bool) if stream.mask is None else stream.mask
        mask = jnp.pad(mask, ((0, 0), (0, parts * count - length))).reshape(-1, parts, count)
        return jnp.broadcast_to(mask, (len(stream.key), parts, count))

    joined = [jnp.concatenate([by_part(s) for s in group], axis=2) for group in groups]
    return jnp.concatenate([mask.reshape(len(mask), -1) for mask in joined], axis=1)
