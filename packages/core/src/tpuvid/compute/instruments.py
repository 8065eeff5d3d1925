"""What hangs on the denoising loop from outside and changes nothing that it computes: progress, a profile, previews, states to
go on from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import jax.numpy as jnp
import numpy as np
import torch
from jax import Array

from tpuvid.compute.moment import Moment
from tpuvid.compute.noise import generator_states
from tpuvid.compute.progress import current
from tpuvid.compute.runtime import Runtime
from tpuvid.compute.schedule import Schedule, estimate
from tpuvid.compute.step_profiler import StepProfiler
from tpuvid.contract.loop import Loop, LoopState, StepDone
from tpuvid.contract.stepcache import ranges

ToLatents = Callable[[np.ndarray], np.ndarray]
"""Makes latents [B, C, f, h, w] of a sample."""


class Instruments:
    """The instruments of one run. Steps that are not `is_full` take from a cache what a full one has left there."""

    def __init__(
        self,
        runtime: Runtime,
        loop: Loop,
        schedule: Schedule,
        generators: Sequence[torch.Generator],
        to_latents: ToLatents,
        is_full: Sequence[bool],
        *,
        begun: int,
    ):
        self._runtime, self._loop, self._schedule = runtime, loop, schedule
        self._generators, self._to_latents, self._is_full, self._begun = generators, to_latents, is_full, begun
        self._profiler = StepProfiler(runtime.profile, is_full)
        self._resumable: Callable[[], LoopState] | None = None
        """Gives what the run goes on from, of the last step that can be gone on from."""
        self._before: Array | None = None

    @contextmanager
    def running(self) -> Iterator[range]:
        """Around the steps, whose numbers it gives; at its end the run's history is noted."""
        progress, total = current(), len(self._is_full)
        with progress.steps("denoise", total, self._begun) as self._report, self._profiler, self._loop.running():
            yield range(self._begun, total)
        if self._profiler.written:
            progress.note("profile", str(self._profiler.written))
        if self._begun:
            progress.note("resumed", f"after step {self._begun}")

    def before(self, number: int, state: Array) -> None:
        """Before a step that begins with `state`, which the step may overwrite."""
        may_be_followed_by_cached = self._is_full[number] and not all(self._is_full)
        if self._loop.after_step and may_be_followed_by_cached:
            self._resumable = self._kept(number, jnp.copy(state))
        self._before = jnp.copy(state) if self._loop.estimates_after(number + 1) else None

    def profiled(self, number: int) -> AbstractContextManager[None]:
        """Around the device's work on a step."""
        return self._profiler.step(number)

    def after(self, number: int, moment: Moment, state: Array) -> None:
        """Told of a step's moment and of the `state` after it, once that is computed."""
        done, total = number + 1, len(self._is_full)
        self._report(done)
        if self._loop.after_step is None:
            return
        if done == total or self._is_full[done]:
            self._resumable = self._kept(done, state)
        assert self._resumable is not None, "the first step is a full one"
        seen = self._estimate(number, self._before, moment, state)
        self._loop.after_step(StepDone(done, total, state=self._resumable, estimate=seen))

    def _kept(self, step: int, state: Array) -> Callable[[], LoopState]:
        """What a run goes on from before `step`; fetched when it is asked for."""
        drawn = generator_states(self._generators)
        return lambda: LoopState(step, self._runtime.fetch(state), drawn)

    def _estimate(
        self, step: int, before: Array | None, moment: Moment, after: Array
    ) -> Callable[[], Callable[[], np.ndarray]]:
        def fetched() -> Callable[[], np.ndarray]:
            known, found = self._runtime.fetch(before), self._runtime.fetch(after)
            if len(moment.drawn):
                known = np.concatenate([known[:1], moment.drawn, known[1 + len(moment.drawn) :]])
            return lambda: self._to_latents(estimate(self._schedule, step, known, found))

        return fetched


def note_cache(name: str, is_full: Sequence[bool]) -> None:
    """Which steps a cache has served."""
    found = {
        what: ranges(i for i, full in enumerate(is_full) if full is flag) for what, flag in (("full", True), ("cached", False))
    }
    current().note("cache", {"name": name, **found, "saved_steps": is_full.count(False)})
