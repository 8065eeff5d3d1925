"""Pixels between RGB and the 4:2:0 pictures of an mp4, by the colours that the file says it has.

Ours are BT.709 in all (matrix, primaries, transfer) and limited range (Y from 16 to 235), whatever their size, and say so: a
player that is told nothing takes large pictures for BT.709 and small ones for BT.601 (ITU-R BT.709-6, H.264 annex E).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import av

BT709 = 1
"""In H.264's tables, and so in FFmpeg's, the number of BT.709 among matrices, primaries and transfer functions."""
LIMITED, FULL = 1, 2
HD_LINES = 720
"""Pictures with fewer are taken for BT.601 where the file says nothing."""
MATRICES = {1: "ITU709", 4: "FCC", 5: "ITU601", 6: "ITU601", 7: "SMPTE240M", 9: "BT2020", 10: "BT2020"}
"""FFmpeg's names of the matrices that H.264 numbers so."""


def declare(stream: Any) -> None:
    """Have a stream that is going to be encoded say its colours, in the pictures and in the container's ``colr`` box."""
    context = stream.codec_context
    context.color_range, context.colorspace, context.color_primaries, context.color_trc = LIMITED, BT709, BT709, BT709


def from_rgb(pixels: np.ndarray) -> av.VideoFrame:
    """A picture to encode of pixels [H, W, 3], uint8."""
    import av

    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
        format="yuv420p", dst_colorspace="ITU709", src_color_range="JPEG", dst_color_range="MPEG", interpolation=_exactly()
    )
    frame.colorspace, frame.color_range = BT709, LIMITED
    return frame


def to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """Pixels [H, W, 3], uint8, of a decoded picture, by what it says of itself."""
    guessed = "ITU709" if frame.height >= HD_LINES else "ITU601"
    return frame.reformat(
        format="rgb24",
        src_colorspace=MATRICES.get(int(frame.colorspace), guessed),
        src_color_range="JPEG" if int(frame.color_range) == FULL else "MPEG",
        dst_color_range="JPEG",
        interpolation=_exactly(),
    ).to_ndarray()


def _exactly() -> Any:
    from av.video.reformatter import Interpolation

    return Interpolation.BICUBIC | 0x40000 | 0x2000 | 0x4000  # SWS_ACCURATE_RND, SWS_FULL_CHR_H_INT, SWS_FULL_CHR_H_INP
