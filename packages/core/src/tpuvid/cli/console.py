"""Progress on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tpuvid.compute.progress import Progress, StepReport


class ConsoleProgress(Progress):
    """Lines and a bar on stderr with s/step and ETA; silent where stderr is no terminal."""

    def __init__(self) -> None:
        super().__init__()
        self._visible = sys.stderr.isatty()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        hint = " (can take minutes the first time; kept for later runs)" if name.startswith("compile") else ""
        self._show(f"{name}{hint} …")
        before = self.seconds.get(name, 0.0)
        try:
            with super().phase(name):
                yield
        except BaseException:
            self._show("\n")  # what is said next starts its own line
            raise
        self._show(f"\r{name}: {self.seconds[name] - before:.1f} s\033[K\n")

    @contextmanager
    def steps(self, name: str, total: int, done: int = 0) -> Iterator[StepReport]:
        from tqdm import tqdm

        bar = tqdm(total=total, initial=done, desc=name, unit="step", disable=not self._visible)
        with Progress.phase(self, name), bar:
            yield _Bar(total, done, bar)

    def say(self, text: str) -> None:
        self._show(f"{text}\n")

    def _show(self, text: str) -> None:
        if self._visible:
            sys.stderr.write(text)
            sys.stderr.flush()


class _Bar(StepReport):
    def __init__(self, total: int, done: int, bar):
        super().__init__(total, done)
        self.bar = bar

    def __call__(self, done: int) -> None:
        self.bar.update(done - self.done)
        super().__call__(done)
