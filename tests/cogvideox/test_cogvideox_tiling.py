"""``vae_tiling=True`` is diffusers' ``vae.enable_tiling()``: the same tiles, blended in the same order."""

import numpy as np
import pytest
import torch
import tpuvid
from cogvideox.random_checkpoint import RandomCogVideoX
from diffusers import AutoencoderKLCogVideoX
from tpuvid.stages import Latents


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


def random_latents(*shape):
    torch.manual_seed(0)
    return torch.randn(1, 4, *shape)


def stock(vae, z):
    with torch.no_grad():
        frames = vae.decode(z / vae.config.scaling_factor).sample
    return (frames / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).numpy()


def ours(pipe, z):
    return list(pipe.decode_chunks(Latents(model_id=pipe.spec.model_id, latents=z.numpy(), config=pipe.spec.defaults)))


@pytest.mark.parametrize(
    "frames, height, width, chunks",
    [
        (7, 7, 3, [9, 8, 8]),  # 2 × 1 tiles; the second row is 2 latents high; width alone would not be tiled
        (1, 11, 9, [1]),  # 3 × 3 tiles, the last ones a single latent
        (4, 5, 14, [8, 8]),  # exactly one stride high
    ],
)
def test_tiles_are_those_of_diffusers(tiled, vae, frames, height, width, chunks):
    """Also in time: the stock code batches latent frames within a tile as it does within a whole picture."""
    z = random_latents(frames, height, width)
    vae.enable_tiling()
    expected = stock(vae, z)
    found = ours(tiled, z)
    assert [c.shape[1] for c in found] == chunks
    found = np.concatenate(found, axis=1)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    vae.disable_tiling()
    assert np.abs(stock(vae, z) - expected).max() > 0.01, "tiles that change nothing test nothing"


def test_published_tiles(checkpoint):
    """The published VAE's own sizes: 240 × 360 pixels, overlapping by a sixth and a fifth."""
    vae = AutoencoderKLCogVideoX.from_pretrained(checkpoint, subfolder="vae")
    vae.enable_tiling()
    z = random_latents(2, 27, 46)
    found = np.concatenate(ours(tpuvid.load(str(checkpoint), vae_tiling=True), z), axis=1)
    np.testing.assert_allclose(found, stock(vae, z), atol=1e-4)


def test_what_fits_one_tile_is_decoded_whole(small_tiles, tiled, vae):
    """6 × 5 latents are one tile, though others would start at 5 and 4."""
    z = random_latents(3, 6, 5)
    vae.enable_tiling()
    found = np.concatenate(ours(tiled, z), axis=1)
    np.testing.assert_allclose(found, stock(vae, z), atol=1e-4)
    np.testing.assert_allclose(found, np.concatenate(ours(tpuvid.load(str(small_tiles)), z), axis=1), atol=1e-6)


def test_the_record_says_so(tiled):
    z = random_latents(1, 4, 4)
    video = tiled.decode(Latents(model_id=tiled.spec.model_id, latents=z.numpy(), config=tiled.spec.defaults))
    assert video.history["decode"]["vae_tiling"] is True
