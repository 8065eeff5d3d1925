"""``vae_tiling=True`` is diffusers' ``vae.enable_tiling()``: the same tiles, blended in the same order."""

import numpy as np
import pytest
import tpuvid
from diffusers import AutoencoderKLCogVideoX
from shared.decoding import check_tiles, chunks_of, latents_of, random_latents, stock_frames
from tpuvid_cogvideox.conformance import RandomCogVideoX


@pytest.fixture(scope="module")
def small_tiles(tmp_path_factory):
    """A VAE whose tiles are 48 × 40 pixels: 6 × 5 latents, the next one 5 and 4 further on."""
    return RandomCogVideoX(vae_size=(96, 80)).save(tmp_path_factory.mktemp("checkpoints") / "small-tiles")


@pytest.fixture(scope="module")
def tiled(small_tiles):
    return tpuvid.load(str(small_tiles), vae_tiling=True)


@pytest.fixture(scope="module")
def vae(small_tiles):
    return AutoencoderKLCogVideoX.from_pretrained(small_tiles, subfolder="vae")


def denormalised(vae, latents):
    return latents / vae.config.scaling_factor


@pytest.mark.parametrize(
    "frames, height, width, chunks",
    [
        (7, 7, 3, [9, 8, 8]),  # 2 × 1 tiles; the second row is 2 latents high; width alone would not be tiled
        pytest.param(1, 11, 9, [1], marks=pytest.mark.slow),  # 3 × 3 tiles, the last ones a single latent
        pytest.param(4, 5, 14, [8, 8], marks=pytest.mark.slow),  # exactly one stride high
    ],
)
def test_tiles_are_those_of_diffusers(tiled, vae, frames, height, width, chunks):
    """Also in time: the stock code batches latent frames within a tile as it does within a whole picture."""
    latents = random_latents(1, 4, frames, height, width)
    check_tiles(tiled, vae, latents, denormalised(vae, latents), chunks)


@pytest.mark.slow
def test_published_tiles(checkpoint):
    """The published VAE's own sizes: 240 × 360 pixels, overlapping by a sixth and a fifth."""
    vae = AutoencoderKLCogVideoX.from_pretrained(checkpoint, subfolder="vae")
    vae.enable_tiling()
    latents = random_latents(1, 4, 2, 27, 46)
    found = np.concatenate(chunks_of(tpuvid.load(str(checkpoint), vae_tiling=True), latents), axis=1)
    np.testing.assert_allclose(found, stock_frames(vae, denormalised(vae, latents)), atol=1e-4)


def test_what_fits_one_tile_is_decoded_whole(small_tiles, tiled, vae):
    """6 × 5 latents are one tile, though others would start at 5 and 4."""
    latents = random_latents(1, 4, 3, 6, 5)
    vae.enable_tiling()
    found = np.concatenate(chunks_of(tiled, latents), axis=1)
    np.testing.assert_allclose(found, stock_frames(vae, denormalised(vae, latents)), atol=1e-4)
    np.testing.assert_allclose(found, np.concatenate(chunks_of(tpuvid.load(str(small_tiles)), latents), axis=1), atol=1e-6)


def test_the_record_says_so(tiled):
    latents = random_latents(1, 4, 1, 4, 4)
    video = tiled.decode(latents_of(tiled, latents))
    assert video.history["decode"]["vae_tiling"] is True
