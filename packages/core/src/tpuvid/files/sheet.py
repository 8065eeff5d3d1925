"""A contact sheet: a video's frames in one picture, taken as they come."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from tpuvid.contract.paths import path_of
from tpuvid.files.atomic import atomic_path
from tpuvid.files.mp4 import to_uint8

SHEET_FRAMES = 12
SHEET_TILE = 192  # pixels: small clips are enlarged to about this, so that a person can see them
SHEET_GAP = 4
SHEET_KEPT = 512
"""Small frames that are held at most: of longer videos every second one, or fourth, …"""


class ContactSheet:
    """Up to 12 frames, evenly spaced from first to last (of a long video, about), as one PNG."""

    def __init__(self) -> None:
        self._small: list[np.ndarray] = []
        self._last: np.ndarray | None = None
        self._seen, self._every = 0, 1
        self._tile = (0, 0)

    def add(self, frames: np.ndarray) -> None:
        """Add the next frames: [n, H, W, 3] in [0, 1]."""
        from PIL import Image

        height, width = frames.shape[1:3]
        zoom = SHEET_TILE / max(height, width)
        zoom = max(1, round(zoom)) if zoom >= 1 else zoom
        self._tile = max(1, round(width * zoom)), max(1, round(height * zoom))
        for frame in map(to_uint8, frames):
            small = frame if zoom >= 1 else np.asarray(Image.fromarray(frame).resize(self._tile, Image.Resampling.LANCZOS))
            self._last = small
            if self._seen % self._every == 0:
                self._small.append(small)
            self._seen += 1
            if len(self._small) > SHEET_KEPT:
                self._small, self._every = self._small[::2], 2 * self._every

    def save(self, path: Path) -> None:
        from PIL import Image

        wanted = np.linspace(0, self._seen - 1, min(SHEET_FRAMES, self._seen)).round().astype(int)
        chosen = [*(self._small[index // self._every] for index in wanted[:-1]), self._last]
        columns = min(6, len(chosen))
        rows = math.ceil(len(chosen) / columns)
        gap, (width, height) = SHEET_GAP, self._tile
        sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
        for place, small in enumerate(chosen):
            picture = Image.fromarray(small).resize(self._tile, Image.Resampling.NEAREST)
            row, column = divmod(place, columns)
            sheet.paste(picture, (gap + column * (width + gap), gap + row * (height + gap)))
        sheet.save(path, format="PNG")


def save_contact_sheet(frames: np.ndarray, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write the `ContactSheet` of frames [F, H, W, 3] in [0, 1]."""
    path, sheet = path_of(path), ContactSheet()
    sheet.add(frames)
    with atomic_path(path, overwrite=overwrite) as temporary:
        sheet.save(temporary)
    return path
