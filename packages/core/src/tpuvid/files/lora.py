"""LoRA files as users name them: a path and a strength."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tpuvid.contract.paths import path_of
from tpuvid.errors import InputError
from tpuvid.files.digests import file_sha256
from tpuvid.files.readers import readable_safetensors


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA file and the strength that it is merged with."""

    path: Path
    scale: float = 1.0

    def check(self) -> None:
        """Raise `InputError` unless the file is readable safetensors and the scale a number."""
        from safetensors import safe_open

        if isinstance(self.scale, bool) or not isinstance(self.scale, int | float) or not math.isfinite(self.scale):
            raise InputError(f"lora_scale={self.scale!r}: needs a finite number")
        with readable_safetensors(self.path), safe_open(self.path, framework="numpy"):
            pass

    def sha256(self) -> str:
        """The hash of the file."""
        stat = self.path.stat()
        return _file_sha256(self.path, stat.st_size, stat.st_mtime_ns)


def read_loras(path: str | Path | None, scale: float | None) -> tuple[Lora, ...]:
    """The LoRA that `tpuvid.load` is given, checked; raises `InputError`."""
    if path is None:
        return ()
    lora = Lora(path_of(path), 1.0 if scale is None else scale)
    lora.check()
    return (lora,)


@lru_cache(maxsize=8)
def _file_sha256(path: Path, size: int, mtime_ns: int) -> str:
    """The hash of a file with its size and time of change, by which it is known again without reading."""
    return file_sha256(path)
