"""The half of Wan's VAE that decodes, for one latent frame at a time. Source: `AutoencoderKLWan._decode` of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import nn
from tpuvid.family import build


class FrameDecoder(nn.Module):
    """The half of the VAE that decodes, under the checkpoint's own names."""

    def __init__(self, vae: AutoencoderKLWan):
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder
        self.slots = sum(isinstance(m, WanCausalConv3d) for m in self.decoder.modules())
        ratio = vae.spatial_compression_ratio
        self.facts = {
            "mean": vae.config.latents_mean,
            "std": vae.config.latents_std,
            "tile_height": (vae.tile_sample_min_height, vae.tile_sample_stride_height, ratio),
            "tile_width": (vae.tile_sample_min_width, vae.tile_sample_stride_width, ratio),
        }

    def forward(self, z, cache, first_chunk):
        x = self.decoder(self.post_quant_conv(z), feat_cache=cache, feat_idx=[0], first_chunk=first_chunk)
        return x, cache


def build_decoder(config: Mapping[str, Any]) -> FrameDecoder:
    """The half that decodes, of vae/config.json."""
    return build(lambda: FrameDecoder(AutoencoderKLWan.from_config(config)))
