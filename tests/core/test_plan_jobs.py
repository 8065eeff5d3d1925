import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from tpuvid import InputError
from tpuvid.compute.progress import current
from tpuvid.errors import TpuvidError
from tpuvid.files import scratch as scratch_module
from tpuvid.files.scratch import LOCK, PREFIX, scratch_folder
from tpuvid.plan.jobs import Jobs, Task

TESTS = {"PYTHONPATH": str(Path(__file__).parents[1])}


def echo(argument):
    print("what a library prints goes elsewhere")
    with current().phase("one"):
        return argument | {"variable": os.environ["A_VARIABLE"]}


def refuse(argument):
    raise InputError("height=70: needs a multiple of 16")


def crash(argument):
    raise RuntimeError("a bug\nwith details")


def hang(argument):
    with current().phase("hanging"):
        time.sleep(600)


def die(argument):
    os.kill(os.getpid(), signal.SIGKILL)


def cores(argument):
    time.sleep(0.2)  # until whoever started us has said which
    return sorted(os.sched_getaffinity(0))


def run(function, argument=None):
    with scratch_folder() as scratch, Jobs(scratch) as jobs:
        jobs.start("job", f"core.test_plan_jobs:{function.__name__}", argument or {}, TESTS | {"A_VARIABLE": "set"})
        return list(jobs.events())


def test_events_come_in_order_and_the_result_last():
    events = run(echo, {"x": 1})
    begun, ended = (event.pop("progressed") for _, event in events[:2])
    assert begun["what"] == ended["what"] == "one" and begun["seconds"] is None and ended["seconds"] >= 0
    assert events[2:] == [("job", {"result": {"x": 1, "variable": "set"}})]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core can't be shared")
def test_jobs_side_by_side_share_the_cores():
    tasks = [Task(str(n), "core.test_plan_jobs:cores", {}, TESTS) for n in range(3)]
    with scratch_folder() as scratch, Jobs(scratch) as jobs:
        first, second, third = (event["result"] for _, event in jobs.run(tasks, 2))
    assert sorted(first + second) == sorted(os.sched_getaffinity(0))
    assert third in (first, second), "its share is free again"


@pytest.mark.parametrize(
    "function, error, message",
    [
        (refuse, InputError, "^height=70: needs a multiple of 16$"),
        (crash, TpuvidError, "^RuntimeError: a bug$"),
        (die, TpuvidError, "was killed, perhaps for want of memory"),
    ],
)
def test_errors_of_a_job_are_ours(function, error, message):
    with pytest.raises(error, match=message):
        run(function)


def test_a_scratch_folder_goes_whatever_happens():
    with pytest.raises(KeyError), scratch_folder() as folder:
        (folder / "large").write_text("x")
        raise KeyError
    assert not folder.exists()


def test_what_a_killed_process_left_goes_with_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch_module.tempfile, "gettempdir", lambda: str(tmp_path))
    left, foreign = tmp_path / f"{PREFIX}left", tmp_path / f"{PREFIX}of-someone-else"
    left.mkdir()
    foreign.mkdir()
    (left / LOCK).touch()  # and nobody holds it
    with scratch_folder() as alive, scratch_folder():
        assert not left.exists() and foreign.exists() and alive.exists()


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_killed_parent_leaves_no_job_and_no_files(sign, tmp_path):
    script = textwrap.dedent("""
        import signal
        from core.test_plan_jobs import TESTS, hang
        from tpuvid.files.scratch import scratch_folder
        from tpuvid.plan.jobs import Jobs
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
        with scratch_folder() as scratch, Jobs(scratch) as jobs:
            jobs.start("job", "core.test_plan_jobs:hang", {}, TESTS)
            for name, event in jobs.events():
                print(jobs._running["job"].pid, scratch, flush=True)
    """)
    environment = {**os.environ, **TESTS, "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    child, scratch = parent.stdout.readline().split()
    assert Path(scratch).exists()
    parent.send_signal(sign)
    parent.wait(timeout=60)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and (Path(scratch).exists() or Path("/proc", child).exists()):
        time.sleep(0.05)
    assert not Path("/proc", child).exists()
    assert list(tmp_path.iterdir()) == []
