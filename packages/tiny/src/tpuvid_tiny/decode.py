"""Stage 3 of wan-tiny, fast and a bit worse: a small network that has learnt to draw what the VAE's decoder draws.

A latent frame, the one before it and the first one give four video frames; the first latent frame gives one. Nothing else is
remembered, so all frames of a chunk are one batch. The VAE, which remembers, need not say in later latents what colour things
have: without the first one, a red cross has turned magenta. After the idea of TAEHV (https://github.com/madebyollin/taehv);
trained by ``training/train_preview.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from jax import Array
from jaxtyping import Float
from torch import Tensor, nn
from tpuvid.family import FRAMES, Checkpoint, Runtime, Side, Tiling, TracedModule, VaeDecoder, build, split_evenly

COMPRESSION = 8
"""Pixels per latent, along each side."""
FRAMES_PER_LATENT = 4
CHUNK = 8
"""Latent frames per call at most: 32 video frames reach the host while the next ones are computed."""
TILE, STRIDE = 256, 192
"""Pixels of a tile and from one to the next, where tiles are asked for: those of the VAE."""


class PreviewNetwork(nn.Module):
    """Latents that the VAE would decode → pixels in about [−1, 1]."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        self.config = dict(config)
        latents, (deep, middle, shallow) = config["latent_channels"], config["widths"]
        self.first = nn.Conv2d(latents, deep, 3, padding=1)
        self.further = nn.Conv2d(3 * latents, deep, 3, padding=1)
        self.deep = nn.Conv2d(deep, deep, 3, padding=1)
        self.up_2 = nn.Conv2d(deep, middle, 3, padding=1)
        self.up_4 = nn.Conv2d(middle, shallow, 3, padding=1)
        self.out = nn.Conv2d(shallow, 3 * FRAMES_PER_LATENT * 2 * 2, 3, padding=1)

    def first_frame(self, z: Float[Tensor, "N C h w"]) -> Float[Tensor, "N 3 1 H W"]:
        return self._draw(self.first(z))[:, :, -1:]

    def further_frames(
        self, first: Float[Tensor, "N C h w"], before: Float[Tensor, "N C h w"], z: Float[Tensor, "N C h w"]
    ) -> Float[Tensor, "N 3 4 H W"]:
        return self._draw(self.further(torch.cat([first, before, z], dim=1)))

    def _draw(self, x: Float[Tensor, "N E h w"]) -> Float[Tensor, "N 3 4 H W"]:
        x = x + self.deep(F.relu(x))
        x = self.up_2(F.interpolate(F.relu(x), scale_factor=2, mode="nearest"))
        x = self.up_4(F.interpolate(F.relu(x), scale_factor=2, mode="nearest"))
        n, _, height, width = x.shape
        x = self.out(F.relu(x)).reshape(n, 3, FRAMES_PER_LATENT, 2, 2, height, width)  # of each pixel, those of 2×2
        return x.permute(0, 1, 2, 5, 3, 6, 4).reshape(n, 3, FRAMES_PER_LATENT, 2 * height, 2 * width)


class PreviewDecoder(VaeDecoder):
    component = "preview"
    stock_vae = "diffusers:AutoencoderKLWan"

    def __init__(self, checkpoint: Checkpoint, runtime: Runtime):
        config = checkpoint.config(self.component)
        self.mean, self.std = (
            np.asarray(config[name], np.float32).reshape(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std")
        )
        side = Side.by_stride(TILE, STRIDE, COMPRESSION)
        super().__init__(
            checkpoint,
            runtime,
            TracedModule(lambda: build(lambda: PreviewNetwork(config)), kept=runtime.kept.outlines, key=config),
            channels=config["latent_channels"],
            tiling=Tiling(side, side),
        )

    def denormalise(self, latents: Float[np.ndarray, "B C f h w"]) -> Float[np.ndarray, "B C f h w"]:
        return latents * self.std + self.mean

    def chunks(self, z: Float[Array, "B C f h w"]) -> Iterator[Float[Array, "B n H W 3"]]:
        first = z[:, :, :1]
        yield self.call("preview, first frame", self._first, first, gives=FRAMES, once=True)
        size = split_evenly(z.shape[2] - 1, CHUNK)
        for start in range(1, z.shape[2], size):
            part = z[:, :, start - 1 : start + size]
            yield self.call("preview, further frames", self._further, first, part, gives=FRAMES)

    def _first(self, params, z: Float[Array, "B C 1 h w"]) -> Float[Array, "B 1 H W 3"]:
        return self.to_frames(self.traced.function("first_frame")(params, z[:, :, 0]))

    def _further(self, params, first: Float[Array, "B C 1 h w"], z: Float[Array, "B C n h w"]) -> Float[Array, "B m H W 3"]:
        """`z` begins with the frame before those that are drawn."""
        before, now = z[:, :, :-1], z[:, :, 1:]
        inputs = (_as_batch(x) for x in (jnp.broadcast_to(first, now.shape), before, now))
        pixels = self.traced.function("further_frames")(params, *inputs)  # [B·n, 3, 4, H, W]
        pixels = jnp.moveaxis(pixels.reshape(len(z), -1, *pixels.shape[1:]), 2, 1)
        return self.to_frames(pixels.reshape(*pixels.shape[:2], -1, *pixels.shape[4:]))


def _as_batch(z: Float[Array, "B C n h w"]) -> Float[Array, "N C h w"]:
    """Each frame of each video."""
    return jnp.moveaxis(z, 2, 1).reshape(-1, z.shape[1], *z.shape[3:])
