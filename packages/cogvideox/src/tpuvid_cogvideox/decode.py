"""Stage 3 of CogVideoX: latents → frames. Source: `AutoencoderKLCogVideoX._decode` of diffusers.

The VAE decodes two latent frames at a time, the first chunk also the odd one: its group norms take their statistics over a
chunk, so other chunks would give another video. Each causal convolution remembers the last frames that it saw. A chunk of
n latent frames gives 4n video frames, 4n − 3 where n is odd.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from diffusers import AutoencoderKLCogVideoX
from jax import Array
from jaxtyping import Float
from torch import nn
from tpuvid.bridge import TracedModule, build
from tpuvid.checkpoint import Checkpoint
from tpuvid.runtime import Runtime, replicated
from tpuvid.sampling import check_latents
from tpuvid.tiling import Side, Tiling
from tpuvid.weights import load_parameters, match_parameters

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

    def forward(self, z, cache):
        z = z if self.post_quant_conv is None else self.post_quant_conv(z)
        return self.decoder(z, conv_cache=cache)


class CogVideoXDecoder:
    def __init__(self, checkpoint: Checkpoint, runtime: Runtime):
        config = checkpoint.config("vae")
        vae = build(lambda: AutoencoderKLCogVideoX.from_config(config))
        self.runtime, self.mesh = runtime, runtime.single_device()
        self.channels, self.scale = vae.config.latent_channels, np.float32(1 / vae.config.scaling_factor)
        self.chunk = vae.num_latent_frames_batch_size
        self.tiling = _tiling(vae) if runtime.vae_tiling else None
        self.traced = TracedModule(build(lambda: ChunkDecoder(vae)))
        self.checkpoint = checkpoint
        self.programs = runtime.programs(self.mesh)

    def verify(self) -> None:
        match_parameters(self.traced, self.checkpoint.weights("vae"), ignore=ENCODER_HALF)

    def load(self) -> None:
        self.params = load_parameters(
            self.traced, self.checkpoint.weights("vae"), mesh=self.mesh, dtype=self.runtime.dtype, ignore=ENCODER_HALF
        )

    def check(self, latents: np.ndarray) -> None:
        check_latents(latents, self.channels)

    def decode(self, latents: Float[np.ndarray, "B C f h w"]) -> Iterator[Float[np.ndarray, "B n H W 3"]]:
        z = (latents.astype(np.float32) * self.scale).astype(self.runtime.dtype)
        yield from self.tiling.decode(z, self._chunks) if self.tiling else self._chunks(z)

    def _chunks(self, z: Float[np.ndarray, "B C f h w"]) -> Iterator[Float[np.ndarray, "B n H W 3"]]:
        z = jax.device_put(z, replicated(self.mesh))
        ends = range(self.chunk + z.shape[2] % self.chunk, z.shape[2] + 1, self.chunk)
        frames, cache, start = None, {}, 0
        for end in ends or (z.shape[2],):  # one latent frame alone is less than a chunk
            part = z[:, :, start:end]
            what = "decoder, further frames" if start else "decoder, first frames"
            run = self.programs.get(what, self._decode, self.params, cache, part)
            upcoming, cache = run(self.params, cache, part)
            if self.tiling:  # until this tile's turn comes again, the device is for the others
                cache = self._to_host(cache) if end < z.shape[2] else None
            if frames is not None:
                yield self._to_host(frames)  # while the device works on the upcoming ones
            frames, start = upcoming, end
        yield self._to_host(frames)

    def _to_host(self, frames: Array | Cache) -> Any:
        with self.runtime.progress.phase("decode"):
            return jax.device_get(frames)

    def _decode(self, params, cache: Cache, z: Float[Array, "B C n h w"]) -> tuple[Float[Array, "B m H W 3"], Cache]:
        pixels, cache = self.traced.function("forward")(params, z, cache)
        frames = pixels.astype(jnp.float32) / 2 + 0.5
        frames = frames if self.tiling else jnp.clip(frames, 0, 1)  # tiles are blended before they are clipped
        return jnp.moveaxis(frames, 1, -1), _carried(cache)


def _tiling(vae: AutoencoderKLCogVideoX) -> Tiling:
    """The tiles that ``vae.enable_tiling()`` takes."""
    return Tiling(
        Side.by_overlap(vae.tile_latent_min_height, vae.tile_sample_min_height, vae.tile_overlap_factor_height),
        Side.by_overlap(vae.tile_latent_min_width, vae.tile_sample_min_width, vae.tile_overlap_factor_width),
    )


def _carried(cache: Cache) -> Cache:
    """What the next chunk looks back at."""
    return {
        name: _carried(value) if isinstance(value, dict) else value for name, value in cache.items() if name not in POINTWISE
    }
