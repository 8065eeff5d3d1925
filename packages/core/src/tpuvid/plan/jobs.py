"""Functions in processes of their own: libtpu reads its settings once in a process, and a compile can't be stopped from within.

A job dies with the process that started it, and what it wrote to its scratch folder goes with it.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

from tpuvid.compute.progress import Progress
from tpuvid.contract.events import Event, Progressed
from tpuvid.errors import InputError, TpuvidError

NO_CACHE = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
"""What comes out of JAX's cache leaves no schedules, and can't always be serialized again."""


@dataclass(frozen=True)
class Task:
    """A job to be started: see `Jobs.start`."""

    name: str
    function: str
    argument: Mapping[str, Any]
    environment: Mapping[str, str]


def jobs_at_once(bytes_each: int) -> int:
    """How many jobs may run at once: as many as there are cores, as far as free memory goes; at least one."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # no Linux
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(os.cpu_count() or 1, free // bytes_each))


def _shares(count: int) -> list[Sequence[int] | None]:
    """This process's cores in `count` equal parts; None where it can't be said or there are fewer."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [cores[n::count] or None for n in range(count)]


class Jobs:
    """Processes that run side by side. Leaving the context kills those that are still at work."""

    def __init__(self, scratch: Path):
        self.scratch = scratch
        self._events: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
        self._running: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running.values():
            process.kill()
        for process in self._running.values():
            process.wait()

    def start(
        self, name: str, function: str, argument: Mapping[str, Any], environment: Mapping[str, str],
        cores: Iterable[int] | None = None,
    ) -> None:  # fmt: skip
        """Run "module:function"(argument) with `argument` JSON-ready and `environment` on top of this process's. What a
        generator yields are its events.

        `cores`: those that it may use; None: all.
        """
        command = [sys.executable, "-W", "ignore", "-m", "tpuvid.plan.jobs", function, str(self.scratch)]
        errors = (self.scratch / f"{name.replace('/', '_')}.stderr").open("w+")
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **NO_CACHE, **environment},
            start_new_session=True,  # what kills our whole group leaves the job alive to notice, and to clean up
        )
        if cores is not None:
            os.sched_setaffinity(process.pid, cores)
        assert process.stdin is not None, "it is a pipe"
        process.stdin.write(json.dumps(argument) + "\n")
        process.stdin.flush()  # and stays open: its end tells the job that we are gone
        self._running[name] = process
        threading.Thread(target=self._listen, args=(name, process, errors), daemon=True).start()

    def run(self, tasks: Iterable[Task], at_once: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """`events` of all `tasks`, of which `at_once` run at a time, each on its share of the cores.

        libtpu starts threads for all cores that it sees, and two of it then stand in each other's way: a plan of Wan 2.1 14B
        for v6e-8 takes 2:50 instead of 3:12 with shares, on two cores (measured 2026-11).
        """
        waiting, shares = iter(tasks), _shares(at_once)
        held: dict[str, Sequence[int] | None] = {}

        def start(count: int) -> None:
            for task in itertools.islice(waiting, count):
                held[task.name] = shares.pop()
                self.start(task.name, task.function, task.argument, task.environment, held[task.name])

        start(at_once)
        for name, event in self.events():
            yield name, event
            if "result" in event:
                shares.append(held.pop(name))
                start(1)

    def events(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(job, event) as they come, until no job is left: "progressed" (the fields of `Progressed`), and at last "result".

        Raises the `TpuvidError` that a job raised, or one that says how it ended.
        """
        while self._running:
            name, event = self._events.get()
            if "error" in event:
                raise (InputError if event["exit_code"] == 2 else TpuvidError)(event["error"])
            if "result" in event:
                self._running.pop(name).wait()
            yield name, event

    def _listen(self, name: str, process: subprocess.Popen, errors: Any) -> None:
        ended = False
        assert process.stdout is not None, "it is a pipe"
        for line in process.stdout:
            event = json.loads(line)
            ended = ended or "result" in event or "error" in event
            self._events.put((name, event))
        code = process.wait()
        errors.seek(0)
        if not ended:
            said = [line for line in errors.read().splitlines() if line.strip()]
            why = "it was killed, perhaps for want of memory" if code in (-9, 137) else (said or ["it said nothing"])[-1]
            self._events.put((name, {"error": f"{name}: the process ended with code {code}: {why}", "exit_code": 1}))
        errors.close()


def _main(function: str, scratch: str) -> NoReturn:
    gc.set_threshold(100_000)  # imports make a million objects, none of which is garbage
    line = _first_line(sys.stdin.fileno())
    if not line:  # whoever started us was killed before it could say what for
        _leave_nothing(scratch)
    argument = json.loads(line)
    threading.Thread(target=_die_with_parent, args=(scratch,), daemon=True).start()
    # libtpu writes to stdout as it likes; what we report goes through a descriptor of its own
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def report(event: Mapping[str, Any]) -> None:
        channel.write(json.dumps(event) + "\n")
        channel.flush()

    def relay(event: Event) -> None:
        if isinstance(event, Progressed):
            report({"progressed": asdict(event)})

    module, _, name = function.partition(":")
    try:
        with Progress(relay).watching():
            found = getattr(importlib.import_module(module), name)(argument)
            if isinstance(found, Iterator):
                for event in found:
                    report(event)
                found = None
            report({"result": found})
    except TpuvidError as error:
        report({"error": str(error), "exit_code": error.exit_code})
    except Exception as error:
        import traceback

        traceback.print_exc()
        first = (str(error).splitlines() or [""])[0]
        report({"error": f"{type(error).__name__}: {first}", "exit_code": 1})
    sys.stderr.flush()
    os._exit(0)  # what Python would do next takes up to 2 s and helps nobody


def _first_line(descriptor: int) -> bytes:
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(descriptor, 1)):
        line += byte
    return line


def _die_with_parent(scratch: str) -> None:
    while os.read(sys.stdin.fileno(), 1):  # ends when the parent does; unbuffered, since a buffered read blocks the exit
        pass
    _leave_nothing(scratch)


def _leave_nothing(scratch: str) -> NoReturn:
    while os.path.exists(scratch):  # again where another thread was just making a file in it
        shutil.rmtree(scratch, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    _main(*sys.argv[1:])
