"""Ctrl-C and SIGTERM: the first finishes the step being computed and keeps what was done, the second ends the process."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tpuvid.runs.control import EXIT_INTERRUPTED, EXIT_TERMINATED, CancelToken, Terminated

EXIT_CODES = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_TERMINATED}


@contextmanager
def stoppable() -> Iterator[CancelToken]:
    """A token that signals cancel. Where no loop is running, they raise `KeyboardInterrupt` or `Terminated`.

    A thread is told of every signal, since the main one may be in a computation or a compiler for minutes. Signals that the
    process was started to ignore stay ignored.
    """
    token = CancelToken()
    numbers = [n for n in EXIT_CODES if signal.getsignal(n) != signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        yield token
        return

    def in_main_thread(number: int, _: FrameType | None) -> None:
        if not _finish_step(token, number):
            token.cancel(number)  # seen later where the exception gets lost, as it does in the collector's callbacks
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    ours, pythons = socket.socketpair()
    pythons.setblocking(False)
    old_descriptor = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
    old = {n: signal.signal(n, in_main_thread) for n in numbers}
    old_hook, sys.unraisablehook = sys.unraisablehook, _unless_stopped
    listener = threading.Thread(target=_listen, args=(ours, token, numbers), daemon=True)
    listener.start()
    try:
        yield token
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        sys.unraisablehook = old_hook
        signal.set_wakeup_fd(old_descriptor)
        pythons.close()  # ends the thread
        listener.join()
        ours.close()


def _unless_stopped(unraisable: Any) -> None:
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


def exit_code(terminated: bool) -> int:
    return EXIT_TERMINATED if terminated else EXIT_INTERRUPTED


def _finish_step(token: CancelToken, number: int) -> bool:
    """Cancel, if a loop is there to notice."""
    if token.in_loop and not token.cancelled:
        token.cancel(number)
        print("\ntpuvid: finishing this step, then saving; once more stops at once", file=sys.stderr, flush=True)
    return token.in_loop


def _listen(signals: socket.socket, token: CancelToken, numbers: list[int]) -> None:
    seen = 0
    while data := signals.recv(1):
        number = data[0]
        if number not in numbers:
            continue
        seen += 1
        if seen > 1:  # files are whole or not there at any time
            print("\ntpuvid: stopped", file=sys.stderr, flush=True)
            os._exit(EXIT_CODES[signal.Signals(number)])
        _finish_step(token, number)
