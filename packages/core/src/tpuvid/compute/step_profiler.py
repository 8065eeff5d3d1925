"""A JAX profile of steady denoising steps: the XPlane file for XProf, and a trace for Perfetto."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import jax

from tpuvid.compute.progress import current
from tpuvid.errors import TpuvidError

MOST_PROFILES = 10_000
PROFILED_STEPS = 5
"""Enough to see that steps are alike; traces of many steps are too large to open."""


def steady_steps(is_full: Sequence[bool]) -> range:
    """The steps to profile: past every program's first run, and with a cache beginning at a full step."""
    total = len(is_full)
    cached = next((i for i in range(total) if not is_full[i]), 0)
    first = next((i for i in range(cached + 1, total) if is_full[i]), min(1, total - 1))
    return range(first, min(first + PROFILED_STEPS, total))


class StepProfiler:
    """Profiles the steady ones of a run's steps into a new folder of its own in `folder`; does nothing where that is None."""

    def __init__(self, folder: Path | None, is_full: Sequence[bool]):
        self.folder, self._steps = folder, steady_steps(is_full)
        self._running = ExitStack()
        self.written: Path | None = None
        """Where the profile's files are, once they are written."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()  # also where a step failed or the run was stopped

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around one step, the device's work included."""
        if self.folder is None or number not in self._steps:
            yield
            return
        if number == self._steps.start:
            run = new_folder(self.folder)  # JAX's own names say the second only
            jax.profiler.start_trace(run, create_perfetto_trace=True)
            self._running.callback(self._stop, run)
        with jax.profiler.StepTraceAnnotation("denoise", step_num=number):
            yield
        if number == self._steps[-1]:
            self._running.close()

    def _stop(self, run: Path) -> None:
        with current().phase("write profile", detail=True):
            jax.profiler.stop_trace()
        (self.written,) = (run / "plugins" / "profile").iterdir()


def new_folder(parent: Path) -> Path:
    """The first of ``parent/1``, ``parent/2``, … that does not exist yet, made."""
    for number in range(1, MOST_PROFILES + 1):
        folder = parent / str(number)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise TpuvidError(f"{parent}: holds {MOST_PROFILES} profiles, or is no folder any more; choose another")
