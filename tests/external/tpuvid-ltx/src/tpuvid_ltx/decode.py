"""Stage 3 of LTX-Video: latents → frames. Source: `AutoencoderKLLTXVideo._decode` of diffusers.

The decoder's convolutions look ahead in time as well as back, so all latent frames are one chunk.
"""

from collections.abc import Iterator

import numpy as np
from diffusers import AutoencoderKLLTXVideo
from jax import Array
from jaxtyping import Float
from torch import nn
from tpuvid.errors import InputError
from tpuvid.family import FRAMES, Checkpoint, Runtime, Side, Tiling, VaeDecoder, build

STATISTICS = ("latents_mean", "latents_std")  # of each channel: buffers of the VAE


class LTXDecoder(VaeDecoder):
    stock_vae = "diffusers:AutoencoderKLLTXVideo"

    def __init__(self, checkpoint: Checkpoint, runtime: Runtime):
        vae = build(lambda: AutoencoderKLLTXVideo.from_config(checkpoint.config("vae")))
        self.config, ratio = vae.config, vae.spatial_compression_ratio
        if self.config.timestep_conditioning or any(self.config.decoder_inject_noise):
            raise InputError("this VAE adds noise as it decodes, as from LTX-Video 0.9.1 on; tpuvid-ltx decodes 0.9.0's")
        del vae.encoder
        for name in STATISTICS:  # as parameters they are looked for among the weights, with their shapes
            setattr(vae, name, nn.Parameter(getattr(vae, name)))
        tiling = Tiling(
            Side.by_stride(vae.tile_sample_min_height, vae.tile_sample_stride_height, ratio),
            Side.by_stride(vae.tile_sample_min_width, vae.tile_sample_stride_width, ratio),
        )
        super().__init__(checkpoint, runtime, vae, channels=self.config.latent_channels, tiling=tiling, unused=("encoder.",))

    def denormalise(self, latents: Float[np.ndarray, "B C f h w"]) -> Float[np.ndarray, "B C f h w"]:
        weights = self.checkpoint.weights("vae")  # `tpuvid plan` has none, and wants none of these values
        values = (weights.read(name) if name in weights else 1 for name in STATISTICS)
        mean, std = (np.asarray(value, np.float32).reshape(-1, 1, 1, 1) for value in values)
        return latents * std / self.config.scaling_factor + mean

    def chunks(self, z: Float[Array, "B C f h w"]) -> Iterator[Float[Array, "B F H W 3"]]:
        pixels = self.traced.function("decoder.forward")
        yield self.call("decoder", lambda params, z: self.to_frames(pixels(params, z)), z, gives=FRAMES)
