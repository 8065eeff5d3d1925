"""What a `Denoiser` is given to run its steps with: it calls ``after_step`` after each. Imports neither jax nor torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class LoopState:
    """All that the steps still to come depend on; taken where the next step is a full one, which needs nothing of a cache."""

    step: int
    """Steps done."""
    state: np.ndarray
    """[K, B, …], float32: the sample, and what the scheduler remembers."""
    generators: np.ndarray
    """[B, n], uint8: of each video's noise, as torch gives its state."""


@dataclass(frozen=True, slots=True)
class StepDone:
    """A step has been computed. The functions are to be called before the next one begins."""

    done: int
    total: int
    state: Callable[[], LoopState]
    """Gives the state of the last step that can be gone on from."""
    estimate: Callable[[], Callable[[], np.ndarray]]
    """Fetches what is needed; the result, which any thread may call at any time, gives what the latents [B, C, f, h, w] would
    be if the model were right at this step."""


@dataclass(frozen=True, kw_only=True)
class Loop:
    """What a `Denoiser` is given beside conditioning and settings."""

    seeds: tuple[int, ...]
    """The videos' seeds, one each."""
    after_step: Callable[[StepDone], None] | None = None
    """An exception in it stops the run."""
    start: LoopState | None = None
    """The state that the run goes on from."""
    estimates_after: Callable[[int], bool] = lambda done: False
    """Whether `StepDone.estimate` will be called after so many steps."""
    running: Callable[[], AbstractContextManager[Any]] = nullcontext
    """The context that is entered around the steps, once everything is compiled."""
