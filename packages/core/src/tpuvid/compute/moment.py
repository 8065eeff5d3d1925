"""What changes from one denoising step to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from tpuvid.compute.noise import make_noise
from tpuvid.compute.schedule import Schedule


class Moment(NamedTuple):
    """One step's numbers; made by the host, put into the compiled step."""

    timestep: Float[np.ndarray, ""]
    weights: Float[np.ndarray, "K K1"]
    """The scheduler's weights: see `Schedule.weights`."""
    scale: Float[np.ndarray, ""] | None
    """The scale of guidance; None where it is off."""
    drawn: Float[np.ndarray, "n ..."]
    """Normal noise for a stochastic scheduler's first n memories."""


def first_moment(schedule: Schedule, scales: np.ndarray | None, shape: tuple[int, ...]) -> Moment:
    """The first step's moment, with zeros for what a stochastic scheduler would draw. `shape` is the batch's."""
    drawn = np.zeros((max(schedule.draws, default=0), *shape), np.float32)
    return Moment(schedule.timesteps[0], schedule.weights[0], None if scales is None else scales[0], drawn)


def draw_moment(
    schedule: Schedule, scales: np.ndarray | None, shape: tuple[int, ...], generators: Sequence[torch.Generator], step: int
) -> Moment:
    """The moment of `step`; what it draws is drawn now. `shape` is the batch's."""
    drawn = first_moment(schedule, scales, shape).drawn
    for slot in range(schedule.draws[step] if schedule.draws else 0):
        drawn[slot] = make_noise(shape[1:], generators)
    return Moment(schedule.timesteps[step], schedule.weights[step], None if scales is None else scales[step], drawn)
