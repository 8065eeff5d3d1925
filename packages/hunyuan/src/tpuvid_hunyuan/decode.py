"""Stage 3 of HunyuanVideo 1.5: latents → frames. Source: `AutoencoderKLHunyuanVideo15._decode` of diffusers.

n latent frames give 4n − 3 video frames. Every frame looks back at all earlier ones in the middle block's attention, and
the convolutions at the two before it, so a tile of latents is decoded with all its frames at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo15
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15AttnBlock
from jax import Array
from jaxtyping import Float
from torch import nn
from torch.nn import functional as F
from tpuvid.bridge import TracedModule, build, map_rows
from tpuvid.checkpoint import Checkpoint
from tpuvid.runtime import Runtime, replicated
from tpuvid.sampling import check_latents
from tpuvid.weights import load_parameters, match_parameters

ENCODER_HALF = ("encoder.",)  # the checkpoint's other half


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


class DecoderHalf(nn.Module):
    """The half of the VAE that decodes, under the checkpoint's own names."""

    def __init__(self, vae: AutoencoderKLHunyuanVideo15):
        super().__init__()
        self.decoder = vae.decoder
        attentions = self.decoder.mid_block.attentions
        for i, attention in enumerate(attentions):
            attentions[i] = FrameCausalAttention(attention.in_channels)

    def forward(self, z):
        return self.decoder(z)


class HunyuanDecoder:
    def __init__(self, checkpoint: Checkpoint, runtime: Runtime):
        config = checkpoint.config("vae")
        vae = build(lambda: AutoencoderKLHunyuanVideo15.from_config(config))
        self.runtime, self.checkpoint, self.mesh = runtime, checkpoint, runtime.single_device()
        self.channels, self.scale = vae.config.latent_channels, np.float32(1 / vae.config.scaling_factor)
        self.traced = TracedModule(build(lambda: DecoderHalf(vae)))
        self.programs = runtime.programs(self.mesh)

    def verify(self) -> None:
        match_parameters(self.traced, self.checkpoint.weights("vae"), ignore=ENCODER_HALF)

    def load(self) -> None:
        weights, dtype = self.checkpoint.weights("vae"), self.runtime.dtype
        self.params = load_parameters(self.traced, weights, mesh=self.mesh, dtype=dtype, ignore=ENCODER_HALF)

    def check(self, latents: np.ndarray) -> None:
        check_latents(latents, self.channels)

    def decode(self, latents: Float[np.ndarray, "B C f h w"]) -> Iterator[Float[np.ndarray, "B n H W 3"]]:
        z = (latents.astype(np.float32) * self.scale).astype(self.runtime.dtype)
        z = jax.device_put(z, replicated(self.mesh))
        run = self.programs.get("decoder", self._decode_tile, self.params, z)
        with self.runtime.progress.phase("decode"):
            yield np.asarray(run(self.params, z))

    def _decode_tile(self, params, z: Float[Array, "B C f h w"]) -> Float[Array, "B n H W 3"]:
        pixels = self.traced.function("forward")(params, z)
        frames = jnp.clip(pixels.astype(jnp.float32) / 2 + 0.5, 0, 1)
        return jnp.moveaxis(frames, 1, -1)
