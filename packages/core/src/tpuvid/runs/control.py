"""How a denoising run is watched, kept and stopped: users give a `Control`, of which nothing changes what is computed.

Imports neither jax nor torch.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tpuvid.contract.paths import path_of
from tpuvid.errors import InputError, TpuvidError

if TYPE_CHECKING:
    from tpuvid.contract.values import Latents

EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM, where there is no step to finish."""


class Cancelled(TpuvidError):
    """A run that was stopped by its `CancelToken`, after a whole step."""

    exit_code = EXIT_INTERRUPTED

    def __init__(self, done: int, total: int, savepoint: Path | None, seed: int):
        self.done, self.total, self.savepoint, self.seed = done, total, savepoint, seed
        """Steps, the file that keeps them (None where none was asked for), and the (first) video's seed."""
        super().__init__(f"stopped after step {done} of {total}" + (f"; kept in {savepoint}" if savepoint else ""))


class CancelToken:
    """Stops the run that it is given to, at the end of the step that is being computed; any thread may cancel."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.reason: int | None = None
        """The signal, if it was one."""
        self.in_loop = False
        """Whether steps are being computed, so that cancelling is noticed soon and what was done is kept."""

    def cancel(self, reason: int | None = None) -> None:
        self.reason = reason
        self._event.set()

    @property
    def cancelled(self) -> bool:
        return self._event.is_set()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around a loop that looks at `cancelled` after each step."""
        self.in_loop = True
        try:
            yield
        finally:
            self.in_loop = False


def was_terminated(token: CancelToken, error: BaseException) -> bool:
    """Whether it was SIGTERM that stopped a run, rather than Ctrl-C or a program."""
    return token.reason == signal.SIGTERM or isinstance(error, Terminated)


def raise_if_stopped(token: CancelToken) -> None:
    """Raise if the run was stopped; called between two parts of the work."""
    if token.cancelled:
        raise Terminated if token.reason == signal.SIGTERM else KeyboardInterrupt


@dataclass(frozen=True, kw_only=True)
class Control:
    """How a denoising run is watched, kept and stopped.

    Raises `InputError` for numbers of steps below 1, and for savepoints without a place for them.
    """

    cancel: CancelToken = field(default_factory=CancelToken)
    savepoint_dir: Path | str | None = None
    """Where the state of the run is kept; None: nowhere."""
    savepoint_every: int | None = None
    """Steps from one savepoint to the next; None: one is made only when the run is cancelled."""
    resume: bool = False
    """Go on from the last savepoint of the very same run in `savepoint_dir`, where there is one."""
    preview: Path | str | None = None
    """An animated PNG, renewed while the run goes on."""
    preview_every: int = 1
    """Steps from one preview to the next."""
    on_result: Callable[[Sequence[Latents]], None] = lambda latents: None
    """Called with the latents of a run that is done, before its savepoints are removed."""

    def __post_init__(self) -> None:
        for name in ("savepoint_dir", "preview"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, path_of(value))
        for name in ("savepoint_every", "preview_every"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(f"{name}={value!r}: needs a whole number of steps ≥ 1")
        if self.savepoint_dir is None and (self.resume or self.savepoint_every is not None):
            asked = "resume" if self.resume else f"savepoint_every={self.savepoint_every}"
            raise InputError(f"{asked}: needs savepoint_dir, the folder of the savepoints")
