"""Progress on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from tpuvid.compute.progress import Progress
from tpuvid.contract.events import Event, Noticed, Progressed, Reached

if TYPE_CHECKING:
    from tqdm import tqdm


class Console:
    """Shows progress on stderr, as lines and a bar with s/step and ETA, where that is a terminal; notices always."""

    def __init__(self) -> None:
        self._visible = sys.stderr.isatty()
        self._bar: tqdm | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Noticed):
            click.echo(f"tpuvid: {event.text}", err=True)
        elif self._visible:
            self._draw(event)

    def _draw(self, event: Event) -> None:
        match event:
            case Reached():
                self._show(f"{event.what} {event.number} of {event.total}\n")
            case Progressed(total=int()):
                self._steps(event)
            case Progressed(failed=True):
                self._show("\n")  # what is said next starts its own line
            case Progressed(seconds=None):
                hint = " (can take minutes the first time; kept for later runs)" if event.what.startswith("compile") else ""
                self._show(f"{event.what}{hint} …")
            case Progressed():
                self._show(f"\r{event.what}: {event.seconds:.1f} s\033[K\n")

    def _steps(self, at: Progressed) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=at.total, initial=at.done or 0, desc=at.what, unit="step")
        self._bar.update((at.done or 0) - self._bar.n)
        if at.seconds is not None:
            self._bar.close()
            self._bar = None

    def _show(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


@contextmanager
def watched() -> Iterator[None]:
    """Within it, what this thread computes is shown."""
    with Progress(Console()).watching():
        yield
