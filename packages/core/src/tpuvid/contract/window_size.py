"""The setting ``window_size``, as users say it. Imports neither jax nor torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from tpuvid.errors import InputError


@dataclass(frozen=True, slots=True)
class WindowSize:
    """How far a token of a video sees to either side, at least."""

    size: int
    unit: Literal["frames", "tokens"]

    @classmethod
    def parse(cls, value: Any) -> WindowSize:
        """Read "frames=16", "tokens=8192", or a number of frames; raises `InputError`."""
        found = re.fullmatch(r"(?:(frames|tokens)=)?([0-9]{1,9})", str(value).replace(" ", ""))
        if isinstance(value, bool) or found is None:
            raise InputError(
                f"window_size={str(value)[:40]!r}: needs a number of frames (16 or frames=16) or of tokens (tokens=8192), "
                "whole, from 0 to 999999999"
            )
        return cls(int(found[2]), "tokens" if found[1] == "tokens" else "frames")

    def __str__(self) -> str:
        return f"{self.unit}={self.size}"
