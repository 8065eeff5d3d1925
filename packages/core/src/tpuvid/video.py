"""Frames → an mp4 that plays in a browser, and a contact sheet to look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tpuvid.artifacts import atomic_path
from tpuvid.errors import InputError, TpuvidError

# x264's macroblock tree gives other files for the same frames: 14 different ones in 150 runs, with mbtree=0 one (PyAV 18.1)
X264 = {"crf": "16", "x264-params": "mbtree=0"}

SHEET_FRAMES = 12
SHEET_TILE = 192  # pixels: small clips are enlarged to about this, so that a person can see them


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """[..., C] in [0, 1] → 0 … 255, rounded."""
    return (np.clip(frames, 0, 1) * 255 + 0.5).astype(np.uint8)


def save_mp4(frames: np.ndarray, path: str | Path, *, fps: int, overwrite: bool = False) -> Path:
    """Write frames [F, H, W, 3] in [0, 1] as H.264 (yuv420p, index first). Raises `InputError` if `path` exists or is no .mp4.

    The same frames give the same file, byte for byte. Sides must be even, as 4:2:0 chroma wants; every supported model's are.
    """
    import av

    path = Path(path)
    if path.suffix != ".mp4":
        raise InputError(f"{path}: videos are written as .mp4; give a name that ends so")
    with atomic_path(path, overwrite=overwrite) as temporary:
        try:
            with av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container:
                stream = container.add_stream("libx264", rate=fps, options=X264)
                stream.height, stream.width = frames.shape[1:3]
                stream.pix_fmt = "yuv420p"
                for frame in frames:
                    for packet in stream.encode(av.VideoFrame.from_ndarray(to_uint8(frame), format="rgb24")):
                        container.mux(packet)
                for packet in stream.encode():
                    container.mux(packet)
        except av.error.FFmpegError as error:
            if isinstance(error, OSError):
                raise  # the disk's fault: atomic_path says so
            raise TpuvidError(f"{path}: the video encoder failed ({error})") from error
    return path


def save_contact_sheet(frames: np.ndarray, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write up to 12 frames of [F, H, W, 3], evenly spaced from first to last, as one PNG."""
    from PIL import Image

    path = Path(path)
    chosen = np.linspace(0, len(frames) - 1, min(SHEET_FRAMES, len(frames))).round().astype(int)
    columns = min(6, len(chosen))
    rows = -(-len(chosen) // columns)
    height, width = frames.shape[1:3]
    zoom = SHEET_TILE / max(height, width)
    zoom = max(1, round(zoom)) if zoom >= 1 else zoom
    tile = (max(1, round(width * zoom)), max(1, round(height * zoom)))
    gap = 4
    sheet = Image.new("RGB", (columns * (tile[0] + gap) + gap, rows * (tile[1] + gap) + gap), "white")
    for place, index in enumerate(chosen):
        resample = Image.Resampling.NEAREST if zoom >= 1 else Image.Resampling.LANCZOS
        picture = Image.fromarray(to_uint8(frames[index])).resize(tile, resample)
        row, column = divmod(place, columns)
        sheet.paste(picture, (gap + column * (tile[0] + gap), gap + row * (tile[1] + gap)))
    with atomic_path(path, overwrite=overwrite) as temporary:
        sheet.save(temporary, format="PNG")
    return path
