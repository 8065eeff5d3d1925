"""Carrying out a `Control`: savepoints, previews and cancelling, after each step of a denoising run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tpuvid.contract.loop import Loop, LoopState, StepDone
from tpuvid.runs.control import Cancelled, Control
from tpuvid.runs.kept.savepoints import Savepoints

if TYPE_CHECKING:
    from tpuvid.contract.values import Latents
    from tpuvid.runs.preview import Preview


class Follower:
    """The follower of one run of so many `steps`; `savepoints` and `preview` are None where nothing is kept or shown."""

    def __init__(
        self,
        control: Control,
        steps: int,
        on_step: Callable[[int, int], None] | None,
        savepoints: Savepoints | None,
        preview: Preview | None,
    ):
        self.control, self.steps, self.on_step = control, steps, on_step
        self.savepoints, self.preview = savepoints, preview

    def loop(self, seeds: tuple[int, ...]) -> Loop:
        """What the denoiser is given. Raises `Cancelled` where that was asked for already."""
        self.seed = seeds[0]
        if self.control.cancel.cancelled:
            raise Cancelled(0, self.steps, None, self.seed)
        return Loop(
            seeds=seeds,
            after_step=self._after_step,
            start=self._start(),
            estimates_after=self._shows,
            running=self._running,
        )

    @contextmanager
    def _running(self) -> Iterator[None]:
        with self.control.cancel.watched():
            try:
                yield
            finally:
                if self.preview:
                    self.preview.close()

    def _start(self) -> LoopState | None:
        return self.savepoints.latest(self.steps) if self.savepoints and self.control.resume else None

    def _shows(self, done: int) -> bool:
        return self.preview is not None and (done % self.control.preview_every == 0 or done == self.steps)

    def _after_step(self, at: StepDone) -> None:
        if self.preview is not None and self._shows(at.done):
            self.preview.show_soon(at.estimate())
        if self.on_step:
            self.on_step(at.done, at.total)
        if at.done == at.total:
            return
        cancelled, every = self.control.cancel.cancelled, self.control.savepoint_every
        kept = None
        if self.savepoints and (cancelled or (every and at.done % every == 0)):
            state = at.state()
            kept = self.savepoints.save(state) if state.step else None
        if cancelled:
            raise Cancelled(at.done, at.total, kept, self.seed)

    def finish(self, latents: Sequence[Latents]) -> None:
        """The run is done."""
        self.control.on_result(latents)
        if self.savepoints:
            self.savepoints.clear()
