"""Stage 3 of CogVideoX: latents → frames. Source: `AutoencoderKLCogVideoX._decode` of diffusers.

The VAE decodes two latent frames at a time, the first chunk also the odd one: its group norms take their statistics over a
chunk, so other chunks would give another video. Each causal convolution remembers the last frames that it saw. A chunk of
n latent frames gives 4n video frames, 4n − 3 where n is odd.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from diffusers import AutoencoderKLCogVideoX
from jax import Array
from jaxtyping import Float
from torch import nn
from tpuvid.family import FRAMES, LATENTS, Checkpoint, Runtime, Side, Tiling, VaeDecoder, build

from tpuvid_cogvideox.frames import FRAME_BY_FRAME

ENCODER_HALF = ("encoder.", "quant_conv.")  # the checkpoint's other half

Cache = dict[str, Any]
"""Convolution → the frames [B, C, 2, h, w] that it remembers, nested as the decoder's blocks are."""

POINTWISE = ("conv_y", "conv_b")
"""Convolutions of kernel size 1: they look back at nothing, but the stock cache holds their whole inputs."""


class ChunkDecoder(nn.Module):
    """The half of the VAE that decodes, under the checkpoint's own names."""

    def __init__(self, vae: AutoencoderKLCogVideoX):
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder
        for module in self.decoder.modules():
            module.__class__ = FRAME_BY_FRAME.get(type(module), type(module))

    def forward(self, z, cache):
        z = z if self.post_quant_conv is None else self.post_quant_conv(z)
        return self.decoder(z, conv_cache=cache)


class CogVideoXDecoder(VaeDecoder):
    stock_vae = "diffusers:AutoencoderKLCogVideoX"

    def __init__(self, checkpoint: Checkpoint, runtime: Runtime):
        config = checkpoint.config("vae")
        vae = build(lambda: AutoencoderKLCogVideoX.from_config(config))
        self.scale = np.float32(1 / vae.config.scaling_factor)
        self.chunk = vae.num_latent_frames_batch_size
        tiling = Tiling(
            Side.by_overlap(vae.tile_latent_min_height, vae.tile_sample_min_height, vae.tile_overlap_factor_height),
            Side.by_overlap(vae.tile_latent_min_width, vae.tile_sample_min_width, vae.tile_overlap_factor_width),
        )
        channels = vae.config.latent_channels
        super().__init__(checkpoint, runtime, ChunkDecoder(vae), channels=channels, tiling=tiling, unused=ENCODER_HALF)

    def denormalise(self, latents: Float[np.ndarray, "B C f h w"]) -> Float[np.ndarray, "B C f h w"]:
        return latents * self.scale

    def chunks(self, z: Float[Array, "B C f h w"]) -> Iterator[Float[Array, "B n H W 3"]]:
        ends = range(self.chunk + z.shape[2] % self.chunk, z.shape[2] + 1, self.chunk)
        cache: Cache | None = {}
        start = 0
        for end in ends or (z.shape[2],):  # one latent frame alone is less than a chunk
            part = z[:, :, start:end]
            what = "decoder, further frames" if start else "decoder, first frames"
            frames, cache = self.call(what, self._decode, cache, part, gives=(FRAMES, LATENTS), donate=(1,))
            cache, start = self.set_aside(cache) if end < z.shape[2] else None, end
            yield frames

    def _decode(self, params, cache: Cache, z: Float[Array, "B C n h w"]) -> tuple[Float[Array, "B m H W 3"], Cache]:
        pixels, cache = self.traced.function("forward")(params, z, cache)
        return self.to_frames(pixels), _carried(cache)


def _carried(cache: Cache) -> Cache:
    """What the next chunk looks back at."""
    return {
        name: _carried(value) if isinstance(value, dict) else value for name, value in cache.items() if name not in POINTWISE
    }
