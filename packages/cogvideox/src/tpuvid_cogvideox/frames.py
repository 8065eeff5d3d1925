"""CogVideoX's decoder frame by frame on one device, where a whole chunk of 9 frames at 1360×768 would take 87 GiB.

Strips of frames are small, and go as stock: so they take 1.5 s on a v6e-8 instead of 2.3 (predicted, 81 frames).
Normalisation, activation and causal convolution of one frame follow each other, and of the frames before it only the two that
the convolution looks back at are kept. Statistics of a norm are of the whole chunk, as in the stock modules.
Source: `CogVideoXDecoder3D`, `CogVideoXResnetBlock3D`, `CogVideoXSpatialNorm3D`, `CogVideoXCausalConv3d` and
`CogVideoXUpsample3D` of diffusers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    CogVideoXCausalConv3d,
    CogVideoXDecoder3D,
    CogVideoXResnetBlock3D,
    CogVideoXSpatialNorm3D,
)
from diffusers.models.upsampling import CogVideoXUpsample3D
from torch import Tensor, nn
from torch.nn import functional as F
from tpuvid.family import group_statistics, in_strips, map_rows, scan_rows


class FrameByFrameDecoder(CogVideoXDecoder3D):
    def forward(self, sample, temb=None, conv_cache=None):
        if in_strips():
            return super().forward(sample, temb, conv_cache=conv_cache)
        cache, kept = conv_cache or {}, {}
        hidden, kept["conv_in"] = self.conv_in(sample, conv_cache=cache.get("conv_in"))
        blocks = {"mid_block": self.mid_block} | {f"up_block_{i}": block for i, block in enumerate(self.up_blocks)}
        for name, block in blocks.items():
            hidden, kept[name] = block(hidden, temb, sample, conv_cache=cache.get(name))
        frames, zq = _frames_first(hidden), _frames_first(_repeated(sample, hidden))
        frames, kept["conv_out"] = _normed_convolution(
            frames, zq, (self.norm_out, self.conv_act, self.conv_out), cache.get("conv_out")
        )
        return frames.movedim(0, 2), kept


class FrameByFrameBlock(CogVideoXResnetBlock3D):
    def forward(self, inputs, temb=None, zq=None, conv_cache=None):
        if in_strips():
            return super().forward(inputs, temb, zq, conv_cache=conv_cache)
        cache, kept = conv_cache or {}, {}
        zq = _frames_first(_repeated(zq, inputs))
        inputs = _frames_first(inputs)
        hidden, kept["conv1"] = _normed_convolution(inputs, zq, (self.norm1, self.nonlinearity, self.conv1), cache.get("conv1"))
        layers = self.norm2, self.nonlinearity, self.conv2
        out, kept["conv2"] = _normed_convolution(hidden, zq, layers, cache.get("conv2"), inputs, self._shortcut)
        return out.movedim(0, 2), kept

    def _shortcut(self, frame: Tensor) -> Tensor:
        if self.in_channels == self.out_channels:
            return frame
        return F.conv2d(frame, self.conv_shortcut.weight.squeeze(2), self.conv_shortcut.bias)


class FrameByFrameUpsample(CogVideoXUpsample3D):
    def forward(self, inputs):
        if in_strips() or self.compress_time:  # those of fewer and smaller frames
            return super().forward(inputs)
        return map_rows(lambda frame: self.conv(F.interpolate(frame, scale_factor=2.0)), _frames_first(inputs)).movedim(0, 2)


FRAME_BY_FRAME = {
    CogVideoXDecoder3D: FrameByFrameDecoder,
    CogVideoXResnetBlock3D: FrameByFrameBlock,
    CogVideoXUpsample3D: FrameByFrameUpsample,
}


def _normed_convolution(
    frames: Tensor,
    zq: Tensor,
    layers: tuple[CogVideoXSpatialNorm3D, nn.Module, CogVideoXCausalConv3d],
    last: Tensor | None,
    inputs: Tensor | None = None,
    shortcut: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """[T, B, C, H, W] → [T, B, C', H, W], and the last two frames [B, C, 2, H, W] that the convolution saw.

    To each frame that comes out is added what `shortcut` makes of the one of `inputs`, if there are any.
    """
    norm, activation, conv = layers
    scale, shift = _scale_and_shift(frames, norm.norm_layer)
    weights = [(c.conv.weight.squeeze(2), c.conv.bias) for c in (norm.conv_y, norm.conv_b)]

    def activated(frame: Tensor, z: Tensor) -> Tensor:
        normed = (frame.float() * scale + shift).type_as(frame)
        by, plus = (F.interpolate(F.conv2d(z, *weight), size=tuple(frame.shape[-2:])) for weight in weights)
        return activation(normed * by + plus)

    def one_frame(last: Tensor, frame: Tensor, z: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        seen = torch.cat([last, activated(frame, z)], dim=1)
        out = F.conv2d(seen, taps, conv.conv.bias, padding=(conv.height_pad, conv.width_pad))
        return seen[:, frame.shape[1] :], out if shortcut is None else sum(map(shortcut, inputs), out)

    taps = conv.conv.weight.movedim(2, 1).flatten(1, 2)  # frames that are seen together are more channels of one
    if last is None:  # the first frame stands for those before it
        last = activated(frames[0], zq[0]).repeat(1, conv.time_pad, 1, 1)
    else:
        last = last.movedim(2, 1).flatten(1, 2)
    last, out = scan_rows(one_frame, last, frames, zq, *(() if inputs is None else (inputs,)))
    return out, last.unflatten(1, (conv.time_pad, -1)).movedim(1, 2)


def _frames_first(x: Tensor) -> Tensor:
    """[B, C, T, H, W] → [T, B, C, H, W]"""
    return x.movedim(2, 0)


def _scale_and_shift(frames: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """What `norm` multiplies a channel by, and then adds to it: [B, C, 1, 1], float32."""
    mean, factor = (
        x.repeat_interleave(norm.num_channels // norm.num_groups, dim=1) for x in group_statistics(frames.movedim(0, 2), norm)
    )
    scale = norm.weight.float() * factor
    return tuple(x[:, :, None, None] for x in (scale, norm.bias.float() - mean * scale))


def _repeated(zq: Tensor, f: Tensor) -> Tensor:
    """As many latents as there are frames in `f`; of an odd number the first is of the first latent alone.

    They stay as small as they are: what is pointwise can come before they grow as large as frames.
    """
    frames, size = f.shape[2], tuple(zq.shape[-2:])
    if frames == 1 or frames % 2 == 0:
        return F.interpolate(zq, size=(frames, *size))
    first, rest = F.interpolate(zq[:, :, :1], size=(1, *size)), F.interpolate(zq[:, :, 1:], size=(frames - 1, *size))
    return torch.cat([first, rest], dim=2)
