"""``tpuvid`` in a forked child: nothing is imported again, and the child can be killed at any moment."""

import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    code: int | None
    """None where it was killed."""
    out: str
    err: str
    seconds: float


def warm() -> None:
    """Import what children need; no backend may start before they are forked."""
    import tpuvid.runs.asked.requests
    import tpuvid.runs.batch
    import tpuvid_wan.decode
    import tpuvid_wan.denoise
    import tpuvid_wan.encode
    from transformers import AutoConfig, AutoTokenizer

    assert all((tpuvid.runs.batch, tpuvid.runs.asked.requests, tpuvid_wan.decode, tpuvid_wan.denoise, tpuvid_wan.encode))
    assert all((AutoConfig, AutoTokenizer))


def run(
    arguments: list[str], log: Path, *, until: Callable[[float], bool] = lambda seconds: False, file_bytes: int | None = None
) -> Outcome:
    """``tpuvid *arguments``; killed (SIGKILL) as soon as `until`, given its age, is true.

    `file_bytes`: no file may grow beyond. What it says goes through files in `log`.
    """
    out, err = log / "out", log / "err"
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(arguments, out, err, file_bytes)
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - begin
        if pid:
            code = (
                None if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else os.waitstatus_to_exitcode(status)
            )
            return Outcome(code, out.read_text(), err.read_text(), seconds)
        if until(seconds):
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


def _become(arguments: list[str], out: Path, err: Path, file_bytes: int | None) -> None:
    code = 70
    try:
        for descriptor, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), descriptor)
        if file_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        from tpuvid.cli.main import run as tpuvid

        code = tpuvid(arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        import sys

        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
