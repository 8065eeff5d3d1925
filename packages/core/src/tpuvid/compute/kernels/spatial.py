"""Frames that are split over the mesh axis ``sp`` by height or width, inside `shard_map`.

Each device has a strip of the picture. What looks beyond its edge gets the neighbours' nearest rows (halo exchange), statistics
are taken over all strips, and attention gathers its keys. Where the length isn't a multiple of the strips, the last one
ends with rows that are none of the picture's; nothing reads them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from tpuvid.compute.kernels.placement import SP, SpatialSplit, placement


def choose_split(height: int, width: int, devices: int) -> SpatialSplit | None:
    """Latents [.., height, width] in strips for up to so many devices, along the side that leaves each the least to do."""

    def strips(axis: int, length: int) -> SpatialSplit:
        size = -(-length // devices)
        return SpatialSplit(axis=axis, parts=-(-length // size), length=length, size=size, other=height * width // length)

    split = min(strips(-2, height), strips(-1, width), key=lambda split: split.size / split.length)
    return split if split.parts > 1 else None


Pads = list[tuple[int, int]]
"""Entries before and after, by dimension; the last ones are height and width."""


def take_halo(x: Array, pads: Pads, *, repeat: bool = False) -> tuple[Array, Pads]:
    """`x` with the padding along the side that is split, and the `pads` that remain.

    Where the strip's edge is the picture's, it is padded with zeros, or by repeating the last row; else by what its
    neighbour has.
    """
    split = placement().spatial
    if split is None or pads[split.axis] == (0, 0):
        return x, pads
    x = _with_halo(x, split, *pads[split.axis], repeat)
    return x, [(0, 0) if axis == split.axis % len(pads) else pad for axis, pad in enumerate(pads)]


def spatial_mean(x: Float[Array, " ..."], axes: Sequence[int]) -> Float[Array, " ..."]:
    """The mean over the whole picture; dimensions stay. `axes`, all ≥ 0, have the side that is split among them."""
    split = placement().spatial
    if split is None:
        return jnp.mean(x, axes, keepdims=True)
    side = split.axis % x.ndim
    count = math.prod(x.shape[axis] for axis in axes if axis != side) * split.length * _scale(x, split)
    return lax.psum(jnp.sum(_without_rest(x, split, repeat=False), axes, keepdims=True), SP) / count


def gather_keys(
    key: Float[Array, "B N S D"], value: Float[Array, "B N S D"], mask: Bool[Array, "#B #N #T S"] | None
) -> tuple[Float[Array, "B N S2 D"], Float[Array, "B N S2 D"], Bool[Array, "#B #N #T S2"] | None]:
    """Keys, values and mask of all strips, where every latent pixel is a token. Attention doesn't care for the keys' order."""
    split = placement().spatial
    assert split is not None, "frames are in strips"
    if split.length < split.size * split.parts:
        place = jnp.arange(key.shape[2])
        row = (place // split.other if split.axis == -2 else place) % split.size
        real = (row < _rows_here(split))[None, None, None]
        mask = real if mask is None else mask & real
    key, value = (lax.all_gather(x, SP, axis=2, tiled=True) for x in (key, value))
    return key, value, None if mask is None else lax.all_gather(mask, SP, axis=3, tiled=True)


def _with_halo(x: Array, split: SpatialSplit, before: int, after: int, repeat: bool) -> Array:
    axis, parts = split.axis, split.parts
    x = _without_rest(x, split, repeat)
    length = x.shape[axis]
    # what no device sends arrives as zeros: at the picture's edges
    above = lax.ppermute(_rows(x, length - before, length, axis), SP, [(i, i + 1) for i in range(parts - 1)])
    below = lax.ppermute(_rows(x, 0, after, axis), SP, [(i + 1, i) for i in range(parts - 1)])
    if repeat:
        part = lax.axis_index(SP)
        above = jnp.where(part == 0, _rows(x, 0, 1, axis), above)
        below = jnp.where(part == parts - 1, _rows(x, length - 1, length, axis), below)
    return jnp.concatenate([above, x, below], axis)


def _rows(x: Array, start: int, end: int, axis: int) -> Array:
    return lax.slice_in_dim(x, start, end, axis=axis % x.ndim)


def _scale(x: Array, split: SpatialSplit) -> int:
    """Pixels of `x` per latent."""
    return x.shape[split.axis] // split.size


def _rows_here(split: SpatialSplit) -> Array:
    """The latents of this device's strip that are the picture's."""
    return jnp.minimum(split.length - lax.axis_index(SP) * split.size, split.size)


def _without_rest(x: Array, split: SpatialSplit, repeat: bool) -> Array:
    """`x` with what is none of the picture's as zeros, or as the picture's last row."""
    if split.length == split.size * split.parts:
        return x
    scale, axis = _scale(x, split), split.axis % x.ndim
    real = lax.broadcasted_iota(jnp.int32, x.shape, axis) < scale * _rows_here(split)
    last = scale * (split.length - split.size * (split.parts - 1))  # the last strip's; all others are the picture's wholly
    return jnp.where(real, x, _rows(x, last - 1, last, axis) if repeat else jnp.zeros((), x.dtype))
