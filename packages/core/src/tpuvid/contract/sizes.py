"""Which sizes a model accepts."""

from __future__ import annotations

from dataclasses import dataclass

from tpuvid.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeRules:
    """Which sizes a model accepts. Frames are ``frame_step · n + 1``."""

    frame_step: int
    size_multiple: int
    max_frames: int
    max_size: int

    def check(self, *, height: int, width: int, num_frames: int) -> None:
        """Raise `InputError` naming the nearest valid value of the first size that breaks a rule."""
        for name, size in (("height", height), ("width", width)):
            multiple = self.size_multiple
            if not (multiple <= size <= self.max_size and size % multiple == 0):
                nearest = _nearest(size, multiple, 0, multiple, self.max_size)
                raise InputError(f"{name}={size}: needs a multiple of {multiple} up to {self.max_size}; nearest: {nearest}")
        if not (1 <= num_frames <= self.max_frames and num_frames % self.frame_step == 1 % self.frame_step):
            nearest = _nearest(num_frames, self.frame_step, 1, 1, self.max_frames)
            raise InputError(
                f"num_frames={num_frames}: needs {self.frame_step}n+1 frames up to {self.max_frames}; nearest: {nearest}"
            )


def _nearest(value: int, step: int, offset: int, low: int, high: int) -> str:
    """The valid values around `value` among ``step · n + offset`` within [low, high], for an error message."""
    below = (value - offset) // step * step + offset
    top = (high - offset) // step * step + offset
    return " and ".join(str(v) for v in sorted({min(max(v, low), top) for v in (below, below + step)}))
