"""A run's progress is that of its thread, and whoever watches is told of everything once."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from tpuvid.cli.console import Console
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


def test_a_terminal_shows_them(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    console = Console()
    for event in (
        Reached(what="denoising", number=2, total=4),
        Noticed(text="a batch of 2 failed"),
        Progressed(what="load denoiser"),
        Progressed(what="load denoiser", seconds=1.25),
        Progressed(what="compile denoiser"),
        Progressed(what="compile denoiser", seconds=1.0, failed=True),
        Progressed(what="denoise", done=1, total=4),
        Progressed(what="denoise", done=3, total=4),
        Progressed(what="denoise", done=4, total=4, seconds=2.0),
    ):
        console(event)
    said = capsys.readouterr().err
    assert said.startswith(
        "denoising 2 of 4\ntpuvid: a batch of 2 failed\nload denoiser …\rload denoiser: 1.2 s\033[K\ncompile denoiser"
    )
    assert "kept for later runs) …\ndenoise:" in said.replace("\r", "") and "4/4" in said
