"""What is going on, and how long it took. Library code reports phases; only `ConsoleProgress` shows them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Progress:
    """Records the wall-clock seconds of every phase by name, and notes; shows nothing."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.notes: dict[str, Any] = {}
        self._inner = 0.0

    def note(self, name: str, value: Any) -> None:
        """Keep something, JSON-ready, with the stage's result."""
        self.notes[name] = value

    def say(self, text: str) -> None:
        """Say where the work has got to, for whoever watches."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of the work with no known length: "load denoiser", "compile denoiser". A phase within it counts by itself."""
        outer, self._inner = self._inner, 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + took - self._inner
            self._inner = outer + took

    def note_also(self, name: str, value: str) -> None:
        """One of several things under one name, "; " between them, each once."""
        values = self.notes[name].split("; ") if name in self.notes else []
        if value not in values:
            self.notes[name] = "; ".join([*values, value])

    def take(self) -> dict[str, Any]:
        """The notes and the seconds recorded since the last call."""
        seconds = {name: round(value, 3) for name, value in self.seconds.items()}
        taken = {**self.notes, "seconds": seconds}
        self.seconds, self.notes = {}, {}
        return taken

    @contextmanager
    def steps(self, name: str, total: int, done: int = 0) -> Iterator[StepReport]:
        """A part of the work in `total` steps, some of which may be `done`; call the result after each."""
        with self.phase(name):
            yield StepReport(total, done)


class StepReport:
    def __init__(self, total: int, done: int = 0):
        self.total, self.done = total, done

    def __call__(self, done: int) -> None:
        self.done = done
