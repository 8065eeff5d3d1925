"""The layout of a model over devices, as users say it. Imports neither jax nor torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tpuvid.errors import InputError


@dataclass(frozen=True, slots=True)
class MeshConfig:
    dp: int = 1
    tp: int = 1

    @classmethod
    def parse(cls, text: str) -> MeshConfig:
        """From "dp=2,tp=4"; raises `InputError`."""
        sizes = re.fullmatch(r"(?:dp=(\d+))?,?(?:tp=(\d+))?", text.replace(" ", ""))
        config = cls(*(int(size or 1) for size in sizes.groups())) if sizes and any(sizes.groups()) else None
        if config is None or config.dp < 1 or config.tp < 1:
            raise InputError(f"mesh={text!r}: needs the form dp=2,tp=4 with whole numbers ≥ 1")
        return config
