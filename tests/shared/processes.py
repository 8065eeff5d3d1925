"""Commands in processes of their own that import nothing again: a warmed process forks them (`multiprocessing`'s forkserver).

For what needs a real process (signals, exit codes, plugins on a path of its own), where an import of jax and torch is not
what is tested: that takes longer than most commands. What a command imports by itself needs an interpreter of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

WARM = (
    "tpuvid.cli.generate", "tpuvid.runs.batch", "tpuvid.runs.execution", "tpuvid.runs.outputs", "tpuvid.runs.pipeline",
    "tpuvid_wan.encode", "tpuvid_wan.denoise", "tpuvid_wan.decode",
    "transformers.models.auto.tokenization_auto", "transformers.models.t5.tokenization_t5",
)  # fmt: skip
"""Imported before children are forked; no backend of jax may start there, and no plugin be looked for."""
COMMAND = "from tpuvid.cli.main import main; main()"


class Forked:
    """A command at work; what it prints goes to files."""

    def __init__(
        self, arguments: tuple[str, ...], *, cwd: Path | None = None, env: Mapping[str, str] | None = None, code: str = COMMAND
    ):
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._err = (Path(self._folder.name) / name for name in ("out", "err"))
        self._out.touch()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(WARM))
        environment = dict(os.environ if env is None else env)
        given = (code, arguments, str(cwd or Path.cwd()), environment, str(self._out), str(self._err))
        self._process = context.Process(target=_become, args=given, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def lines(self) -> Iterator[str]:
        """The lines that it prints, as it prints them, until it ends."""
        with self._out.open() as file:
            while True:
                ended = not self._process.is_alive()
                line = file.readline()
                while line and not line.endswith("\n") and not ended:
                    time.sleep(0.002)
                    line += file.readline()
                if line:
                    yield line.rstrip("\n")
                elif ended:
                    return
                else:
                    time.sleep(0.005)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has printed, once it has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired("tpuvid", timeout or 0)
        return self._out.read_text(), self._err.read_text() if self._err.exists() else ""


def tpuvid(
    *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, code: str = COMMAND
) -> subprocess.CompletedProcess:
    """``tpuvid *arguments`` to its end; `code` is what runs in its place, with `arguments` in `sys.argv`."""
    process = Forked(arguments, cwd=cwd, env=env, code=code)
    out, err = process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def _become(code: str, arguments: tuple[str, ...], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    """In the forked child: what a new interpreter would make of its environment."""
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also of tests in the background
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = ["tpuvid", *arguments]
    import jax

    for name in ("jax_disable_most_optimizations", "jax_enable_compilation_cache"):  # read when jax was imported
        if (value := env.get(name.upper())) is not None:
            jax.config.update(name, value.lower() in ("1", "true", "yes"))
    exec(compile(code, "<command>", "exec"), {"__name__": "__main__"})
