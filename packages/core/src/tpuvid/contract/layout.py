"""The layout of a model over devices, as users say it. Imports neither jax nor torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tpuvid.errors import InputError

AXES = ("dp", "sp", "tp")
"""``dp`` splits the batch (the two halves of classifier-free guidance), ``sp`` the tokens, ``tp`` heads and widths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshConfig:
    dp: int = 1
    sp: int = 1
    tp: int = 1
    fsdp: bool | None = None
    """Whether devices that split tokens split the weights of blocks too, and gather them block by block; None: by memory."""

    @property
    def size(self) -> int:
        return self.dp * self.sp * self.tp

    @classmethod
    def parse(cls, text: str) -> MeshConfig:
        """Read "dp=2,sp=4" (with ",fsdp" or ",replicated" about the weights) or "dp=2,tp=4"; raises `InputError`."""
        *parts, last = text.replace(" ", "").split(",")
        fsdp = {"fsdp": True, "replicated": False}.get(last)
        found = [re.fullmatch(r"(\w+)=(\d+)", part) for part in ([*parts, last] if fsdp is None else parts)]
        sizes = {part[1]: int(part[2]) for part in found if part}
        if not sizes or None in found or len(sizes) < len(found) or not set(sizes) <= set(AXES) or min(sizes.values()) < 1:
            raise InputError(
                f"mesh={text!r}: needs the form dp=2,sp=4 (also dp=2,sp=4,fsdp or …,replicated) or dp=2,tp=4, whole numbers ≥ 1"
            )
        if sizes.get("tp", 1) > 1 and sizes.get("sp", 1) > 1:
            raise InputError(f"mesh={text!r}: splits tokens (sp) and widths (tp); choose one of them")
        if fsdp is not None and sizes.get("sp", 1) == 1:
            raise InputError(f"mesh={text!r}: {last} is about layouts that split tokens; add sp=N, or leave it out")
        return cls(**sizes, fsdp=fsdp)

    @classmethod
    def of(cls, layout: str | MeshConfig) -> MeshConfig:
        """`layout` itself, or what it says; raises `InputError`."""
        return layout if isinstance(layout, cls) else cls.parse(str(layout))

    def __str__(self) -> str:
        """The text that `parse` reads."""
        sizes = [f"{axis}={size}" for axis in AXES if (size := getattr(self, axis)) > 1] or ["dp=1"]
        weights = [] if self.fsdp is None else ["fsdp" if self.fsdp else "replicated"]
        return ",".join(sizes + weights)
