"""Stage 3 of Wan: latents → frames. Source: `AutoencoderKLWan._decode` of diffusers.

The VAE decodes one latent frame at a time; each causal convolution remembers the last two frames that it saw. The first
latent frame gives one video frame, every other one four. The stock code keeps shorter memories at the start ("Rep", or
one frame); zeros in their place are exactly the padding that the convolutions would add, so all frames after the first
run as one `jax.lax.scan`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from torch import nn
from tpuvid.errors import InputError
from tpuvid.family import FRAMES, LATENTS, Checkpoint, Runtime, Side, Tiling, TracedModule, VaeDecoder, split_evenly

ENCODER_HALF = ("encoder.", "quant_conv.")  # the checkpoint's other half

CHUNK = 8
"""Latent frames per call at most: 32 video frames reach the host while the next ones are computed."""

LOOK_BACK = 2
"""Frames that a convolution remembers: ``CACHE_T`` of diffusers."""

Cache = dict[int, Array]
"""Slot of a convolution → the frames [B, C, 2, h, w] that it remembers."""


def _build(config: Mapping[str, Any]) -> nn.Module:
    from tpuvid_wan.vae import build_decoder  # diffusers is imported when something has to be traced

    return build_decoder(config)


class WanDecoder(VaeDecoder):
    stock_vae = "diffusers:AutoencoderKLWan"

    def __init__(self, checkpoint: Checkpoint, runtime: Runtime):
        config = checkpoint.config("vae")
        if config.get("patch_size") or config.get("is_residual"):
            raise InputError("this checkpoint's VAE is Wan 2.2's (patch_size, is_residual); tpuvid-wan decodes Wan 2.1's")
        traced = TracedModule(lambda: _build(config), kept=runtime.kept.outlines, key=config)
        facts = traced.facts
        self.mean, self.std = (np.asarray(x, np.float32).reshape(1, -1, 1, 1, 1) for x in (facts.mean, facts.std))
        tiling = Tiling(Side.by_stride(*facts.tile_height), Side.by_stride(*facts.tile_width))
        super().__init__(checkpoint, runtime, traced, channels=self.mean.shape[1], tiling=tiling, unused=ENCODER_HALF)

    def denormalise(self, latents: Float[np.ndarray, "B C f h w"]) -> Float[np.ndarray, "B C f h w"]:
        return latents * self.std + self.mean

    def chunks(self, z: Float[Array, "B C f h w"]) -> Iterator[Float[Array, "B n H W 3"]]:
        frames, cache = self.call("decoder, first frame", self._first, z[:, :, :1], gives=(FRAMES, LATENTS), once=True)
        size = split_evenly(z.shape[2] - 1, CHUNK)
        for start in range(1, z.shape[2], size):
            cache = self.set_aside(cache)
            yield frames
            part = z[:, :, start : start + size]
            frames, cache = self.call("decoder, further frames", self._rest, cache, part, gives=(FRAMES, LATENTS), donate=(1,))
        del cache  # nothing looks back at the last frame
        yield frames

    def _first(self, params, z: Float[Array, "B C 1 h w"]) -> tuple[Float[Array, "B 1 H W 3"], Cache]:
        frames, found = self._decode(params, z, [None] * self.traced.module.slots, first_chunk=True)
        # the shapes that the memories have from the second frame on
        shapes = jax.eval_shape(lambda p, z: self._decode(p, z, list(found), first_chunk=False)[1], params, z)
        cache = {}
        for slot, (value, shape) in enumerate(zip(found, shapes, strict=True)):
            if isinstance(value, Array):
                missing = LOOK_BACK - value.shape[2]
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
        return self.to_frames(pixels), cache


def _join(frames: Float[Array, "n B t H W C"]) -> Float[Array, "B m H W C"]:
    """One chunk of frames out of what each scan step gave, in order."""
    frames = jnp.moveaxis(frames, 0, 1)
    return frames.reshape(frames.shape[0], -1, *frames.shape[3:])
