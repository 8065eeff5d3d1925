"""The plan of tiles and their blending, on tiles whose right result is known without a model."""

import numpy as np
import pytest
from tpuvid.family import Side, Tiling

WAN = Side.by_stride(256, 192, 8)
COGVIDEOX = Side.by_overlap(30, 240, 1 / 6), Side.by_overlap(45, 360, 1 / 5)
HUNYUAN = Side.by_overlap(16, 256, 0.25)
SMALL = Side.by_stride(6, 4, 1)


def test_sides_as_diffusers_computes_them():
    assert WAN == Side(size=32, stride=24, blend=64, keep=192)
    assert COGVIDEOX == (Side(size=30, stride=25, blend=40, keep=200), Side(size=45, stride=36, blend=72, keep=288))
    assert HUNYUAN == Side(size=16, stride=12, blend=64, keep=192)


def test_the_last_tiles_are_smaller():
    assert WAN.slices(50) == [slice(0, 32), slice(24, 50), slice(48, 50)]
    assert WAN.slices(24) == [slice(0, 24)]


def decode_exactly(z):
    """A decoder that doubles nothing and remembers nothing: a pixel is a latent, a chunk is a frame."""
    for frame in range(z.shape[2]):
        yield np.repeat(z[:, 0, frame, None, :, :, None], 3, axis=-1)


@pytest.mark.parametrize("height, width", [(6, 6), (7, 6), (4, 9), (10, 13), (1, 30)])
def test_tiles_that_agree_give_the_whole_picture(height, width):
    z = np.random.default_rng(0).random((1, 4, 3, height, width), np.float32)
    chunks = list(Tiling(SMALL, SMALL).decode(z, decode_exactly))
    assert [c.shape for c in chunks] == [(1, 1, height, width, 3)] * 3
    np.testing.assert_allclose(np.concatenate(chunks, axis=1)[..., 0], z[:, 0], atol=1e-6)


def test_a_tile_fades_in_over_the_overlap():
    zeros, ones = (np.full((1, 1, 6, 6, 3), value, np.float32) for value in (0, 1))
    across = Tiling(SMALL, SMALL).blend([[zeros, ones]])
    np.testing.assert_allclose(across[0, 0, 0, :, 0], [0, 0, 0, 0, 0, 0.5, 1, 1])
    down = Tiling(SMALL, SMALL).blend([[zeros], [ones]])
    np.testing.assert_allclose(down[0, 0, :, 0, 0], [0, 0, 0, 0, 0, 0.5, 1, 1])


def test_first_from_above_then_from_the_left():
    """Where four tiles meet the order shows: what comes from above is halved once more, what comes from the left is not."""

    def corner(*values):
        rows = [[np.full((1, 1, 6, 6, 3), value, np.float32) for value in row] for row in values]
        return Tiling(SMALL, SMALL).blend(rows)[0, 0, 5, 5, 0]

    assert corner((0, 0), (1, 0)) == 0.25  # left: half of it is above's, and half of the rest fades out
    assert corner((0, 1), (0, 0)) == 0.125  # above: half of it is its left one's, and it fades out twice


def test_blending_comes_before_clipping():
    def decode(z):
        yield np.full((1, 1, *z.shape[-2:], 3), 3.0 if z[0, 0, 0, 0, 0] else -1.0, np.float32)

    z = np.zeros((1, 1, 1, 6, 10), np.float32)
    z[..., 4:] = 1
    row = next(Tiling(SMALL, SMALL).decode(z, decode))[0, 0, 0, :, 0]
    np.testing.assert_allclose(row[[0, 4, 5, 6]], [0, 0, 1, 1])


def test_chunks_come_before_any_tile_is_done():
    decoded = []

    def decode(z):
        for chunk in decode_exactly(z):
            decoded.append(z.shape)
            yield chunk

    chunks = Tiling(SMALL, SMALL).decode(np.zeros((1, 1, 5, 7, 7), np.float32), decode)
    next(chunks)
    assert len(decoded) == 4, "one chunk of each of the 2 × 2 tiles"


def test_tiles_that_disagree_about_their_chunks_are_a_fault():
    def decode(z):
        yield from list(decode_exactly(z))[: z.shape[-1]]

    with pytest.raises(ValueError, match="shorter"):
        list(Tiling(SMALL, SMALL).decode(np.zeros((1, 1, 5, 6, 7), np.float32), decode))
