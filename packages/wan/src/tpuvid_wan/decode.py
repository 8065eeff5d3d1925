"""Stage 3 of Wan: latents → frames. Source: `AutoencoderKLWan._decode` of diffusers.

The VAE decodes one latent frame at a time; each causal convolution remembers the last two frames that it saw. The first
latent frame gives one video frame, every other one four. The stock code keeps shorter memories at the start ("Rep", or
one frame); zeros in their place are exactly the padding that the convolutions would add, so all frames after the first
run as one `jax.lax.scan`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import CACHE_T, WanCausalConv3d
from jax import Array
from jaxtyping import Float
from torch import nn
from tpuvid.bridge import TracedModule, build
from tpuvid.checkpoint import Checkpoint
from tpuvid.errors import InputError
from tpuvid.runtime import Runtime, replicated
from tpuvid.sampling import check_latents
from tpuvid.tiling import Side, Tiling
from tpuvid.weights import load_parameters, match_parameters

ENCODER_HALF = ("encoder.", "quant_conv.")  # the checkpoint's other half

CHUNK = 8
"""Latent frames per call at most: 32 video frames reach the host while the next ones are computed."""

Cache = dict[int, Array]
"""Slot of a convolution → the frames [B, C, 2, h, w] that it remembers."""


class FrameDecoder(nn.Module):
    """The half of the VAE that decodes, under the checkpoint's own names."""

    def __init__(self, vae: AutoencoderKLWan):
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder
        self.slots = sum(isinstance(m, WanCausalConv3d) for m in self.decoder.modules())

    def forward(self, z, cache, first_chunk):
        x = self.decoder(self.post_quant_conv(z), feat_cache=cache, feat_idx=[0], first_chunk=first_chunk)
        return x, cache


class WanDecoder:
    def __init__(self, checkpoint: Checkpoint, runtime: Runtime):
        config = checkpoint.config("vae")
        if config.get("patch_size") or config.get("is_residual"):
            raise InputError("this checkpoint's VAE is Wan 2.2's (patch_size, is_residual); tpuvid-wan decodes Wan 2.1's")
        vae = build(lambda: AutoencoderKLWan.from_config(config))
        self.runtime, self.mesh = runtime, runtime.single_device()
        self.mean, self.std = (
            np.asarray(values, np.float32).reshape(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        self.tiling = _tiling(vae) if runtime.vae_tiling else None
        self.traced = TracedModule(build(lambda: FrameDecoder(vae)))
        self.checkpoint = checkpoint
        self.programs = runtime.programs(self.mesh)

    def verify(self) -> None:
        match_parameters(self.traced, self.checkpoint.weights("vae"), ignore=ENCODER_HALF)

    def load(self) -> None:
        self.params = load_parameters(
            self.traced, self.checkpoint.weights("vae"), mesh=self.mesh, dtype=self.runtime.dtype, ignore=ENCODER_HALF
        )

    def check(self, latents: np.ndarray) -> None:
        check_latents(latents, self.mean.shape[1])

    def decode(self, latents: Float[np.ndarray, "B C f h w"]) -> Iterator[Float[np.ndarray, "B n H W 3"]]:
        z = (latents.astype(np.float32) * self.std + self.mean).astype(self.runtime.dtype)
        yield from self.tiling.decode(z, self._chunks) if self.tiling else self._chunks(z)

    def _chunks(self, z: Float[np.ndarray, "B C f h w"]) -> Iterator[Float[np.ndarray, "B n H W 3"]]:
        z = jax.device_put(z, replicated(self.mesh))
        run = self.programs.get("decoder, first frame", self._first, self.params, z[:, :, :1])
        frames, cache = run(self.params, z[:, :, :1])
        count = z.shape[2] - 1
        size = next((n for n in range(CHUNK, 0, -1) if count % n == 0), 1)
        for start in range(1, z.shape[2], size):
            part = z[:, :, start : start + size]
            run = self.programs.get("decoder, further frames", self._rest, self.params, cache, part)
            upcoming, cache = run(self.params, cache, part)
            if self.tiling:  # until this tile's turn comes again, the device is for the others
                cache = self._to_host(cache) if start + size < z.shape[2] else None
            yield self._to_host(frames)  # while the device works on the upcoming ones
            frames = upcoming
        del cache  # of a single latent frame: nothing looks back at it
        yield self._to_host(frames)

    def _to_host(self, frames: Array | Cache) -> Any:
        with self.runtime.progress.phase("decode"):
            return jax.device_get(frames)

    def _first(self, params, z: Float[Array, "B C 1 h w"]) -> tuple[Float[Array, "B 1 H W 3"], Cache]:
        frames, found = self._decode(params, z, [None] * self.traced.module.slots, first_chunk=True)
        # the shapes that the memories have from the second frame on
        shapes = jax.eval_shape(lambda p, z: self._decode(p, z, list(found), first_chunk=False)[1], params, z)
        cache = {}
        for slot, (value, shape) in enumerate(zip(found, shapes)):
            if isinstance(value, Array):
                missing = CACHE_T - value.shape[2]
                cache[slot] = jnp.pad(value, ((0, 0), (0, 0), (missing, 0), (0, 0), (0, 0)))
            elif value is not None:  # "Rep": a temporal upsampler that the first frame skips
                cache[slot] = jnp.zeros(shape.shape, shape.dtype)
        return frames, cache

    def _rest(self, params, cache: Cache, z: Float[Array, "B C n h w"]) -> tuple[Float[Array, "B m H W 3"], Cache]:
        def one_frame(cache: Cache, z: Float[Array, "B C h w"]) -> tuple[Cache, Float[Array, "B 4 H W 3"]]:
            slots = [cache.get(slot) for slot in range(self.traced.module.slots)]
            frames, slots = self._decode(params, z[:, :, None], slots, first_chunk=False)
            return {slot: slots[slot] for slot in cache}, frames

        cache, frames = jax.lax.scan(one_frame, cache, jnp.moveaxis(z, 2, 0))
        return _join(frames), cache

    def _decode(self, params, z, cache, *, first_chunk: bool):
        forward = self.traced.function("forward", first_chunk=first_chunk)
        pixels, cache = forward(params, z, cache)
        frames = pixels.astype(jnp.float32) / 2 + 0.5
        frames = frames if self.tiling else jnp.clip(frames, 0, 1)  # tiles are blended before they are clipped
        return jnp.moveaxis(frames, 1, -1), cache


def _tiling(vae: AutoencoderKLWan) -> Tiling:
    """The tiles that ``vae.enable_tiling()`` takes."""
    ratio = vae.spatial_compression_ratio
    return Tiling(
        Side.by_stride(vae.tile_sample_min_height, vae.tile_sample_stride_height, ratio),
        Side.by_stride(vae.tile_sample_min_width, vae.tile_sample_stride_width, ratio),
    )


def _join(frames: Float[Array, "n B t H W C"]) -> Float[Array, "B m H W C"]:
    """One chunk of frames out of what each scan step gave, in order."""
    frames = jnp.moveaxis(frames, 0, 1)
    return frames.reshape(frames.shape[0], -1, *frames.shape[3:])
