"""Stage 3 of HunyuanVideo 1.5: latents → frames. Source: `AutoencoderKLHunyuanVideo15._decode` of diffusers.

The middle block, whose attention looks back at all earlier frames, runs on all latent frames at once: they are small. What
follows is convolutions that look back at two frames; with those remembered, it runs latent frame by latent frame. The
first one gives one video frame, every other one four.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo15
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import (
    HunyuanVideo15AttnBlock,
    HunyuanVideo15CausalConv3d,
    HunyuanVideo15Upsample,
)
from jax import Array
from jaxtyping import Float
from torch import nn
from torch.nn import functional as F
from tpuvid.family import FRAMES, LATENTS, Checkpoint, Runtime, Side, Tiling, VaeDecoder, build, map_rows, split_evenly

ENCODER_HALF = ("encoder.",)  # the checkpoint's other half

LOOK_BACK = 2
"""Frames before its own that a convolution sees."""

CHUNK = 8
"""Latent frames per call at most: 32 video frames reach the host while the next ones are computed."""

Memories = list[Array]
"""The frames [B, C, 2, h, w] that each convolution remembers."""


class FrameCausalAttention(HunyuanVideo15AttnBlock):
    """The stock block, frame by frame: its queries under a mask over keys, where the stock one masks all pairs of tokens."""

    def forward(self, x):
        normed = self.norm(x)
        query, key, value = self.to_q(normed), self.to_k(normed), self.to_v(normed)
        batch, channels, frames, height, width = query.shape
        area = height * width
        query = query.permute(2, 0, 3, 4, 1).reshape(frames, batch, 1, area, channels)
        key, value = (t.flatten(2).transpose(1, 2).unsqueeze(1) for t in (key, value))
        index = torch.arange(frames * area, device=x.device)

        def one_frame(query, end):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=(index < end)[None, None, None])

        ends = area * torch.arange(1, frames + 1, device=x.device)
        out = map_rows(one_frame, query, ends)
        out = out.reshape(frames, batch, height, width, channels).permute(1, 4, 0, 2, 3)
        return self.proj_out(out) + x


class RememberingConv(HunyuanVideo15CausalConv3d):
    """The stock convolution, told in `memory` which two frames came before; None at the start, where the first is repeated."""

    memory = None

    def forward(self, x):
        before = x[:, :, :1].repeat(1, 1, LOOK_BACK, 1, 1) if self.memory is None else self.memory
        x = torch.cat([before, x], dim=2)
        self.memory = x[:, :, -LOOK_BACK:]
        return self.conv(F.pad(x, (*self.time_causal_padding[:4], 0, 0), mode=self.pad_mode))


class FollowingUpsample(HunyuanVideo15Upsample):
    """The stock upsampler, which gives one frame for the video's first, also where that came in an earlier part."""

    first = True

    def forward(self, x):
        if self.first or not self.add_temporal_upsample:
            return super().forward(x)
        out, shortcut = (self._dcae_upsample_rearrange(t, r1=2) for t in (self.conv(x), x))
        return out + shortcut.repeat_interleave(repeats=self.repeats, dim=1)


class DecoderHalf(nn.Module):
    """The half of the VAE that decodes, under the checkpoint's own names."""

    def __init__(self, vae: AutoencoderKLHunyuanVideo15):
        super().__init__()
        decoder = self.decoder = vae.decoder
        attentions = decoder.mid_block.attentions
        for i, attention in enumerate(attentions):
            attentions[i] = FrameCausalAttention(attention.in_channels)
        upper = [module for part in (decoder.up_blocks, decoder.conv_out) for module in part.modules()]
        for module in upper:  # same parameters, another forward
            if isinstance(module, HunyuanVideo15CausalConv3d):
                module.__class__ = RememberingConv
            elif isinstance(module, HunyuanVideo15Upsample):
                module.__class__ = FollowingUpsample
        self.convolutions = [m for m in upper if isinstance(m, RememberingConv)]
        self.upsamplers = [m for m in upper if isinstance(m, FollowingUpsample)]

    def middle(self, z):
        x = self.decoder.conv_in(z) + z.repeat_interleave(repeats=self.decoder.repeat, dim=1)
        return self.decoder.mid_block(x)

    def upper(self, x, memories):
        """`memories` as the frames before left them; None for the first frame."""
        for convolution, memory in zip(self.convolutions, memories or [None] * len(self.convolutions), strict=True):
            convolution.memory = memory
        for upsampler in self.upsamplers:
            upsampler.first = memories is None
        for block in self.decoder.up_blocks:
            x = block(x)
        x = self.decoder.conv_out(self.decoder.conv_act(self.decoder.norm_out(x)))
        memories = [convolution.memory for convolution in self.convolutions]
        for convolution in self.convolutions:
            convolution.memory = None  # no traced tensor outlives the trace
        return x, memories


class HunyuanDecoder(VaeDecoder):
    stock_vae = "diffusers:AutoencoderKLHunyuanVideo15"

    def __init__(self, checkpoint: Checkpoint, runtime: Runtime):
        config = checkpoint.config("vae")
        vae = build(lambda: AutoencoderKLHunyuanVideo15.from_config(config))
        self.scale = np.float32(1 / vae.config.scaling_factor)
        tiling = Tiling(
            Side.by_overlap(vae.tile_latent_min_height, vae.tile_sample_min_height, vae.tile_overlap_factor),
            Side.by_overlap(vae.tile_latent_min_width, vae.tile_sample_min_width, vae.tile_overlap_factor),
        )
        channels = vae.config.latent_channels
        super().__init__(checkpoint, runtime, DecoderHalf(vae), channels=channels, tiling=tiling, unused=ENCODER_HALF)

    def denormalise(self, latents: Float[np.ndarray, "B C f h w"]) -> Float[np.ndarray, "B C f h w"]:
        return latents * self.scale

    def chunks(self, z: Float[Array, "B C f h w"]) -> Iterator[Float[Array, "B n H W 3"]]:
        x = self.call("decoder, middle block", self._middle, z, gives=LATENTS)
        frames, memories = self.call("decoder, first frame", self._first, x[:, :, :1], gives=(FRAMES, LATENTS), once=True)
        size = split_evenly(z.shape[2] - 1, CHUNK)
        for start in range(1, z.shape[2], size):
            memories = self.set_aside(memories)
            yield frames
            part = x[:, :, start : start + size]
            frames, memories = self.call(
                "decoder, further frames", self._rest, memories, part, gives=(FRAMES, LATENTS), donate=(1,)
            )
        del memories  # nothing looks back at the last frame
        yield frames

    def _middle(self, params, z: Float[Array, "B C f h w"]) -> Float[Array, "B D f h w"]:
        return self.traced.function("middle")(params, z)

    def _first(self, params, x: Float[Array, "B D 1 h w"]) -> tuple[Float[Array, "B 1 H W 3"], Memories]:
        pixels, memories = self.traced.function("upper")(params, x, None)
        return self.to_frames(pixels), memories

    def _rest(self, params, memories: Memories, x: Float[Array, "B D n h w"]) -> tuple[Float[Array, "B m H W 3"], Memories]:
        def one_frame(memories: Memories, x: Float[Array, "B D h w"]) -> tuple[Memories, Float[Array, "B 4 H W 3"]]:
            pixels, memories = self.traced.function("upper")(params, x[:, :, None], memories)
            return memories, self.to_frames(pixels)

        memories, frames = jax.lax.scan(one_frame, memories, jnp.moveaxis(x, 2, 0))
        frames = jnp.moveaxis(frames, 0, 1)
        return frames.reshape(frames.shape[0], -1, *frames.shape[3:]), memories
