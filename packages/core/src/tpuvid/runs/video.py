"""A video as Python gets it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tpuvid.contract.settings import GenerationConfig
from tpuvid.contract.values import History

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class Video:
    """A video in memory, with the settings that made it."""

    model_id: str
    tensors: Mapping[str, np.ndarray]
    """What the decoder makes, by name."""
    config: GenerationConfig
    history: History = field(default_factory=dict)

    @property
    def frames(self) -> np.ndarray:
        """The frames [B, F, H, W, C], float32 in [0, 1]."""
        return self.tensors["frames"]

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write an H.264 mp4; raise `InputError` where `path` exists and `overwrite` is false."""
        from tpuvid.files.mp4 import save_mp4

        return save_mp4(self.frames[0], path, fps=self.config.fps, overwrite=overwrite)
