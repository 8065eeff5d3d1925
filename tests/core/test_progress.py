"""A run's progress is that of its thread, and whoever watches is told of everything once."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from tpuvid.cli.console import NORMAL, QUIET, VERBOSE, Console
from tpuvid.compute.progress import Progress, current
from tpuvid.contract.events import Noticed, Progressed, Reached


def test_runs_in_two_threads_do_not_mix():
    both = threading.Barrier(2)

    def work(name):
        both.wait()
        with current().phase(name):
            both.wait()  # each within its own
            current().note("name", name)
            both.wait()
        return current().take()

    def run(name):
        seen = []
        with Progress(seen.append).watching():
            return work(name), [event.what for event in seen]

    with ThreadPoolExecutor(2) as threads:
        for name, (taken, seen) in zip("ab", threads.map(run, "ab"), strict=True):
            assert taken["name"] == name and list(taken["seconds"]) == [name] and seen == [name, name]


def test_watching_ends():
    before = current()
    with Progress().watching() as progress:
        assert current() is progress is not before
    assert current() is before


def test_every_part_begins_and_ends_also_in_an_error():
    seen = []
    progress = Progress(seen.append)
    with progress.steps("denoise", 3, done=1) as report:
        report(2)
        report(3)
    with pytest.raises(RuntimeError), progress.phase("load"):
        raise RuntimeError
    assert [(e.what, e.done, e.total, e.seconds is None, e.failed) for e in seen] == [
        ("denoise", 1, 3, True, False),
        ("denoise", 2, 3, True, False),
        ("denoise", 3, 3, True, False),
        ("denoise", 3, 3, False, False),
        ("load", None, None, True, False),
        ("load", None, None, False, True),
    ]


EVENTS = (
    Reached(what="denoising", number=2, total=4),
    Reached(what="decoding", number=1, total=1),
    Noticed(text="a batch of 2 failed"),
    Progressed(what="open denoiser", detail=True),
    Progressed(what="open denoiser", seconds=0.25, detail=True),
    Progressed(what="load denoiser"),
    Progressed(what="load denoiser", seconds=1.25),
    Progressed(what="compile denoiser"),
    Progressed(what="compile denoiser", seconds=1.0, failed=True),
    *(Progressed(what="denoise", done=done, total=20) for done in range(1, 21)),
    Progressed(what="denoise", done=20, total=20, seconds=2.0),
    Progressed(what="decode", done=0, total=2, unit="frame"),
    Progressed(what="decode", done=2, total=2, unit="frame"),
    Progressed(what="decode", done=2, total=2, unit="frame", seconds=0.5),
)
COMPILE = "compile denoiser (can take minutes the first time; kept for later runs) …"


def shown(monkeypatch, capsys, level, *, terminal):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    clock = itertools.count(0.0, 2.0)
    monkeypatch.setattr("tpuvid.cli.console.time.monotonic", lambda: next(clock))
    console = Console(level)
    for event in EVENTS:
        console(event)
    return capsys.readouterr().err


def test_a_terminal_shows_bars(monkeypatch, capsys):
    said = shown(monkeypatch, capsys, NORMAL, terminal=True)
    lines = said.split("\n")
    assert lines[:2] == ["denoising 2 of 4", "tpuvid: a batch of 2 failed"] and "open denoiser" not in said
    assert lines[2] == "load denoiser …\rload denoiser: 1.2 s\033[K" and lines[3] == COMPILE
    assert "denoise: 100%" in said and "20/20" in said and "decode: 100%" in said and "2/2" in said


def test_a_log_gets_a_line_per_phase_and_per_tenth(monkeypatch, capsys):
    said = shown(monkeypatch, capsys, NORMAL, terminal=False).splitlines()
    assert said[:4] == ["denoising 2 of 4", "tpuvid: a batch of 2 failed", "load denoiser …", COMPILE]
    assert said[4] == "denoise: 20 steps, of which 1 are done"
    steps = said[5:-2]
    assert steps[0] == "denoise: 2 of 20 steps, 2 s/step, 36 s left" and steps[-1] == "denoise: 20 of 20 steps, 2 s/step"
    assert len(steps) == 10 and said[-2:] == ["decode: 2 frames", "decode: 2 of 2 frames, 1 s/frame"]


def test_verbose_says_more_and_quiet_only_what_must_be_noticed(monkeypatch, capsys):
    more = shown(monkeypatch, capsys, VERBOSE, terminal=False).splitlines()
    assert "open denoiser …" in more and "load denoiser: 1.2 s" in more
    for terminal in (True, False):
        assert shown(monkeypatch, capsys, QUIET, terminal=terminal) == "tpuvid: a batch of 2 failed\n"
