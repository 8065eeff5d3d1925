"""The short form of `make torture`: every part of it, with few of each, in one process."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
COUNTS = {"kills": 6, "disks": 3, "damages": 120, "arguments": 300}


@pytest.fixture(scope="module")
def tortured():
    """What it printed of each part, by name."""
    arguments = [word for name, count in COUNTS.items() for word in (f"--{name}", str(count))]
    command = [sys.executable, "-W", "ignore", "-m", "torture", *arguments]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(re.findall(r"^(\w+): \d+ s\n((?:  .*\n)*)", done.stdout, re.M))


@pytest.mark.parametrize(
    "part, says",
    [("kills", "jobs: "), ("disks", "refused"), ("damages", "pack: refused"), ("arguments", "exit code 2")],
)
def test_short_torture(tortured, part, says):
    assert says in tortured[part]
