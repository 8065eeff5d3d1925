"""Progress as people read it, on stderr: bars on a terminal, plain lines elsewhere (nohup, the logs of a container)."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from tpuvid.contract.events import Event, Noticed, Progressed, Reached

if TYPE_CHECKING:
    from tqdm import tqdm

QUIET, NORMAL, VERBOSE = -1, 0, 1
LINES_EVERY = 30.0
"""Seconds after which a plain line says where a part has got to; a tenth of its steps is another reason."""


class Console:
    """Shows events. `level` is `QUIET` (nothing but what must be noticed), `NORMAL` or `VERBOSE`."""

    def __init__(self, level: int = NORMAL) -> None:
        self.level = level
        self._terminal = sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._part: str | None = None
        """The part whose steps are counted in lines."""
        self._begun = self._said = 0.0
        self._first = self._last = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Noticed):
            click.echo(f"tpuvid: {event.text}", err=True)
        elif self.level > QUIET:
            self._show(event)

    def _show(self, event: Event) -> None:
        match event:
            case Reached(total=1):
                pass  # what it is a part of says as much
            case Reached():
                self._line(f"{event.what} {event.number} of {event.total}")
            case Progressed(total=int()) if self._terminal:
                self._draw(event)
            case Progressed(total=int()):
                self._count(event)
            case Progressed(detail=True) if self.level < VERBOSE:
                pass
            case Progressed() if self._bar is not None:
                self._bar.set_postfix_str(event.what if event.seconds is None else "")
            case Progressed(failed=True):
                if self._terminal:
                    self._line("")  # what is said next starts its own line
            case Progressed(seconds=None):
                hint = " (can take minutes the first time; kept for later runs)" if event.what.startswith("compile") else ""
                self._line(f"{event.what}{hint} …", end="" if self._terminal else "\n")
            case Progressed() if self._terminal:
                self._line(f"\r{event.what}: {event.seconds:.1f} s\033[K")
            case Progressed() if self.level >= VERBOSE:
                self._line(f"{event.what}: {event.seconds:.1f} s")

    def _draw(self, at: Progressed) -> None:
        """One bar of a part in steps."""
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=at.total, initial=at.done or 0, desc=at.what, unit=at.unit)
        self._bar.update((at.done or 0) - self._bar.n)
        if at.seconds is not None:
            self._bar.close()
            self._bar = None

    def _count(self, at: Progressed) -> None:
        """A line of a part in steps: where it begins, at every tenth, and after half a minute."""
        done, total, now = at.done or 0, at.total or 1, time.monotonic()
        if at.seconds is not None:
            self._part = None
            return
        if self._part != at.what:
            self._part, self._begun, self._said, self._first, self._last = at.what, now, now, done, done
            self._line(f"{at.what}: {total} {at.unit}s" + (f", of which {done} are done" if done else ""))
            return
        if done > self._last and (done * 10 // total > self._last * 10 // total or now - self._said >= LINES_EVERY):
            each = (now - self._begun) / (done - self._first)
            left = f", {each * (total - done):.0f} s left" if done < total else ""
            self._line(f"{at.what}: {done} of {total} {at.unit}s, {each:.2g} s/{at.unit}{left}")
            self._said, self._last = now, done

    def _line(self, text: str, end: str = "\n") -> None:
        sys.stderr.write(text + end)
        sys.stderr.flush()
