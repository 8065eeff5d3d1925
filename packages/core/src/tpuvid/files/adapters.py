"""LoRA files merged into a checkpoint's weights while they are read, so that adapted models run at full speed.

W' = W + scale · up · down (arXiv:2106.09685), computed in float32, shard by shard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tpuvid.errors import InputError
from tpuvid.files.weights import Weights


@dataclass(frozen=True, slots=True)
class LowRank:
    """What a LoRA adds to one weight [out, in]: scale · up [out, r] · down [r, in]."""

    down: np.ndarray
    up: np.ndarray
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], self.down.shape[1])

    def part(self, index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = index or (slice(None), slice(None))
        return self.scale * (self.up[rows] @ self.down[:, columns])


@dataclass(frozen=True, slots=True)
class Offset:
    """What a LoRA adds to a bias or a weight outright."""

    value: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def part(self, index: tuple[slice, ...]) -> np.ndarray:
        return self.value[index or ...]


Delta = LowRank | Offset


class AdaptedWeights(Weights):
    """A component's tensors with deltas added as they are read."""

    def __init__(self, base: Weights, deltas: Mapping[str, Sequence[Delta]], source: str):
        """Raises `InputError` naming `source` where a delta has no weight, or not its shape."""
        self.folder, self._slices = base.folder, base._slices
        self._deltas = deltas
        if stray := sorted(set(deltas) - set(base)):
            more = f" and {len(stray) - 3} more" if len(stray) > 3 else ""
            raise InputError(
                f"{source}: adapts {', '.join(stray[:3])}{more}, which this model doesn't have; it was made for another model"
            )
        for name, changes in deltas.items():
            if wrong := next((d.shape for d in changes if d.shape != base[name]), None):
                raise InputError(f"{source}: adapts {name} as {wrong}, here it is {base[name]}; it was made for another model")

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        value = super().read(name, index)
        deltas = self._deltas.get(name, ())
        return sum((delta.part(index) for delta in deltas), start=value.astype(np.float32)) if deltas else value
