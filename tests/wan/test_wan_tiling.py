"""``vae_tiling=True`` is diffusers' ``vae.enable_tiling()``: the same tiles, blended in the same order."""

import numpy as np
import pytest
import torch
import tpuvid
from diffusers import AutoencoderKLWan
from shared.decoding import check_tiles, chunks_of, latents_of, random_latents, stock_frames


@pytest.fixture(scope="module")
def tiled(checkpoint):
    return tpuvid.load(str(checkpoint), vae_tiling=True)


@pytest.fixture(scope="module")
def vae(checkpoint):
    return AutoencoderKLWan.from_pretrained(checkpoint, subfolder="vae")


def denormalised(vae, latents):
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return latents * std + mean


@pytest.mark.parametrize(
    "frames, height, width, chunks",
    [
        (5, 33, 8, [1, 8, 8]),  # a second row of tiles, 9 latents high; each remembers frames from chunk to chunk
        # 3 × 2 tiles, the last row 2 latents high, the last column 1 wide: less than a blend
        pytest.param(1, 50, 25, [1], marks=pytest.mark.slow),
    ],
)
def test_tiles_are_those_of_diffusers(checkpoint, vae, frames, height, width, chunks, monkeypatch):
    monkeypatch.setattr("tpuvid_wan.decode.CHUNK", 2)
    pipe = tpuvid.load(str(checkpoint), vae_tiling=True)
    latents = random_latents(1, 4, frames, height, width)
    check_tiles(pipe, vae, latents, denormalised(vae, latents), chunks)
    if frames > 2:
        decoder = pipe._opened["decode"]
        assert [len(programs._compiled) for programs in (decoder.once, decoder.programs)] == [2, 2], (
            "2 shapes of tile, each once"
        )


def test_what_fits_one_tile_is_decoded_whole(checkpoint, tiled, vae):
    """32 × 32 latents are one tile, though a second one would start at 24."""
    latents = random_latents(1, 4, 1, 32, 32)
    vae.enable_tiling()
    found = np.concatenate(chunks_of(tiled, latents), axis=1)
    np.testing.assert_allclose(found, stock_frames(vae, denormalised(vae, latents)), atol=1e-4)
    np.testing.assert_allclose(found, np.concatenate(chunks_of(tpuvid.load(str(checkpoint)), latents), axis=1), atol=1e-6)


def test_the_record_says_so(tiled, checkpoint):
    latents = random_latents(1, 4, 1, 4, 4)
    for pipe, tiling in ((tiled, True), (tpuvid.load(str(checkpoint)), False)):
        video = pipe.decode(latents_of(pipe, latents))
        assert video.history["decode"]["vae_tiling"] is tiling
