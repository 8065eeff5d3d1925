"""``vae_tiling=True`` is diffusers' ``vae.enable_tiling()``: the same tiles, blended in the same order."""

import numpy as np
import pytest
import tpuvid
from diffusers import AutoencoderKLHunyuanVideo15
from shared.decoding import check_tiles, chunks_of, random_latents


@pytest.mark.parametrize(
    "frames, height, width, chunks",
    [
        (5, 17, 3, [1, 8, 8]),  # 2 × 1 tiles of 16 latents, 12 apart; each remembers frames from chunk to chunk
        pytest.param(1, 13, 25, [1], marks=pytest.mark.slow),  # 2 × 3 tiles, the last ones a single latent
    ],
)
def test_tiles_are_those_of_diffusers(checkpoint, frames, height, width, chunks, monkeypatch):
    monkeypatch.setattr("tpuvid_hunyuan.decode.CHUNK", 2)
    pipe = tpuvid.load(str(checkpoint), vae_tiling=True)
    vae = AutoencoderKLHunyuanVideo15.from_pretrained(checkpoint, subfolder="vae")
    latents = random_latents(1, 4, frames, height, width)
    check_tiles(pipe, vae, latents, latents / vae.config.scaling_factor, chunks)


def test_what_fits_one_tile_is_decoded_whole(checkpoint):
    tiled, plain = (tpuvid.load(str(checkpoint), vae_tiling=tiling) for tiling in (True, False))
    latents = random_latents(1, 4, 1, 16, 3)
    np.testing.assert_allclose(
        *(np.concatenate(chunks_of(pipe, latents), axis=1) for pipe in (tiled, plain)), rtol=0, atol=1e-6
    )
