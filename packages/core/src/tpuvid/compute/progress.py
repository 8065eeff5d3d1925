"""What a run is doing, and how long each part took. A run's progress is that of its thread, so that runs don't mix."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self

from tpuvid.contract.events import Emit, Event, Noticed, Progressed, Reached


class Progress:
    """The wall-clock seconds of every phase of a run, by name, and notes; `emit` is told of what happens."""

    def __init__(self, emit: Emit = lambda event: None) -> None:
        self.emit = emit
        self.seconds: dict[str, float] = {}
        self.notes: dict[str, Any] = {}
        self._inner = 0.0

    @contextmanager
    def watching(self) -> Iterator[Self]:
        """Within it, what this thread computes is reported here: see `current`."""
        token = _current.set(self)
        try:
            yield self
        finally:
            _current.reset(token)

    def note(self, name: str, value: Any) -> None:
        """Keep something, JSON-ready, with the stage's result."""
        self.notes[name] = value

    def note_also(self, name: str, value: str) -> None:
        """One of several things under one name, "; " between them, each once."""
        values = self.notes[name].split("; ") if name in self.notes else []
        if value not in values:
            self.notes[name] = "; ".join([*values, value])

    def notice(self, text: str) -> None:
        """Something that the user should know at once."""
        self.emit(Noticed(text=text))

    def reach(self, what: str, number: int, total: int) -> None:
        """The next of several like parts begins: "decoding 2 of 4"."""
        self.emit(Reached(what=what, number=number, total=total))

    @contextmanager
    def phase(self, name: str, *, detail: bool = False) -> Iterator[None]:
        """A part of the work with no known length: "load denoiser", "compile denoiser". A phase within it counts by itself.

        `detail`: what most who watch need not see: they see what it is a part of.
        """

        def event(seconds: float | None, failed: bool) -> Progressed:
            return Progressed(what=name, seconds=seconds, failed=failed, detail=detail)

        with self._timed(event, name):
            yield

    @contextmanager
    def steps(
        self, name: str, total: int, done: int = 0, *, unit: str = "step", counted_as: str | None = None
    ) -> Iterator[Callable[[int], None]]:
        """A part of the work in `total` steps, some of which may be `done`; call the result after each with those done.

        `counted_as`: the name under which its seconds are kept, where parts within it have its own.
        """
        at = done

        def report(done: int) -> None:
            nonlocal at
            at = done
            self.emit(event())

        def event(seconds: float | None = None, failed: bool = False) -> Progressed:
            return Progressed(what=name, done=at, total=total, unit=unit, seconds=seconds, failed=failed)

        with self._timed(event, counted_as or name):
            yield report

    @contextmanager
    def _timed(self, event: Callable[[float | None, bool], Event], name: str) -> Iterator[None]:
        outer, self._inner = self._inner, 0.0
        failed = True
        self.emit(event(None, False))
        start = time.perf_counter()
        try:
            yield
            failed = False
        finally:
            took = time.perf_counter() - start
            own = took - self._inner
            self.seconds[name] = self.seconds.get(name, 0.0) + own
            self._inner = outer + took
            self.emit(event(own, failed))

    def take(self) -> dict[str, Any]:
        """The notes and the seconds recorded since the last call."""
        seconds = {name: round(value, 3) for name, value in self.seconds.items()}
        taken = {**self.notes, "seconds": seconds}
        self.seconds, self.notes = {}, {}
        return taken


_current: ContextVar[Progress | None] = ContextVar("progress", default=None)


def current() -> Progress:
    """That of the run which this thread computes; one that nobody watches where none is."""
    found = _current.get()
    if found is None:
        found = Progress()
        _current.set(found)
    return found
