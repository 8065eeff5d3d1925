"""Tiled decoding: latents in overlapping tiles → frames, as diffusers' ``vae.enable_tiling()`` makes them.

The device works on one tile at a time. A tile fades into the one above and then into the one to its left, linearly over the
pixels that they share. All tiles advance chunk by chunk in time together, so that frames still come as a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

DecodeTile = Callable[[np.ndarray], Iterator[np.ndarray]]
"""Latents [B, C, f, h, w] of a tile → chunks of its frames [B, n, H, W, 3], first to last, not clipped yet."""


@dataclass(frozen=True, slots=True)
class Side:
    """Tiles along height or width."""

    size: int
    """Latents of a tile; the last ones may be smaller."""
    stride: int
    """Latents from the start of a tile to that of the next."""
    blend: int
    """Pixels over which a tile fades into the one before."""
    keep: int
    """Pixels of a tile that its successor leaves to it."""

    @classmethod
    def by_stride(cls, pixels: int, stride: int, compression: int) -> Side:
        """Make it from a tile and a stride in pixels, and the pixels per latent; source: `AutoencoderKLWan.tiled_decode`."""
        return cls(size=pixels // compression, stride=stride // compression, blend=pixels - stride, keep=stride)

    @classmethod
    def by_overlap(cls, latents: int, pixels: int, overlap: float) -> Side:
        """Make it from a tile in latents and in pixels, and the fraction that overlaps.

        Source: ``tiled_decode`` of `AutoencoderKLCogVideoX` and `AutoencoderKLHunyuanVideo15`.
        """
        blend = int(pixels * overlap)
        return cls(size=latents, stride=int(latents * (1 - overlap)), blend=blend, keep=pixels - blend)

    def slices(self, length: int) -> list[slice]:
        """Where the tiles of `length` latents lie."""
        return [slice(start, min(start + self.size, length)) for start in range(0, length, self.stride)]


@dataclass(frozen=True, slots=True)
class Tiling:
    height: Side
    width: Side

    def decode(self, z: Float[np.ndarray, "B C f h w"], decode_tile: DecodeTile) -> Iterator[Float[np.ndarray, "B n H W 3"]]:
        """Chunks of frames in [0, 1]; what is no larger than a tile is decoded whole."""
        h, w = z.shape[-2:]
        if h <= self.height.size and w <= self.width.size:
            for frames in decode_tile(z):
                yield np.clip(frames, 0, 1)
            return
        columns = self.width.slices(w)
        tiles = [decode_tile(z[..., row, column]) for row in self.height.slices(h) for column in columns]
        for chunks in zip(*tiles, strict=True):
            rows = [list(chunks[i : i + len(columns)]) for i in range(0, len(chunks), len(columns))]
            yield np.clip(self.blend(rows), 0, 1)

    def blend(self, rows: list[list[Float[np.ndarray, "B n _ _ 3"]]]) -> Float[np.ndarray, "B n H W 3"]:
        """The picture that a grid of tiles makes."""
        above: list[np.ndarray] = []
        strips = []
        for row in rows:
            blended: list[np.ndarray] = []
            for column, tile in enumerate(row):
                if above:
                    tile = _fade(above[column], tile, self.height.blend, axis=2)
                if blended:
                    tile = _fade(blended[-1], tile, self.width.blend, axis=3)
                blended.append(tile)
            strips.append(np.concatenate([t[:, :, : self.height.keep, : self.width.keep] for t in blended], axis=3))
            above = blended  # as they are shown: faded into their own neighbours
        return np.concatenate(strips, axis=2)


def _fade(before: np.ndarray, tile: np.ndarray, extent: int, axis: int) -> np.ndarray:
    """`tile` with its first pixels along `axis` mixed with the last ones of `before`, from all of `before` to all of `tile`."""
    extent = min(before.shape[axis], tile.shape[axis], extent)
    before, tile = np.moveaxis(before, axis, -1), np.moveaxis(tile, axis, -1)
    ramp = (np.arange(extent) / max(extent, 1)).astype(tile.dtype)
    mixed = before[..., before.shape[-1] - extent :] * (1 - ramp) + tile[..., :extent] * ramp
    return np.moveaxis(np.concatenate([mixed, tile[..., extent:]], axis=-1), -1, axis)
