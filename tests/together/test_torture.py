"""The short form of `make torture`: every part of it, with few of each."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "part, count, says",
    [("kills", 6, "jobs: "), ("disks", 3, "refused"), ("damages", 120, "pack: refused"), ("arguments", 300, "exit code 2")],
)
def test_short_torture(part, count, says):
    parts = ("kills", "disks", "damages", "arguments")
    arguments = [word for name in parts for word in (f"--{name}", str(count if name == part else 0))]
    command = [sys.executable, "-W", "ignore", "-m", "torture", *arguments]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert says in done.stdout
