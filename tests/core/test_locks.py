"""Two processes on one file: the second is told who has it; a killed one leaves no lock."""

import subprocess
import sys
from pathlib import Path

import pytest
from tpuvid.errors import InputError
from tpuvid.files.locks import locked

HOLD = (
    "import sys, time; from pathlib import Path; from tpuvid.files.locks import locked\n"
    "with locked(Path(sys.argv[1])):\n print('held', flush=True); time.sleep(100)"
)


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "clip.mp4")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_process_is_told_who_has_it(tmp_path, holder):
    with pytest.raises(InputError, match=rf"clip.mp4: process {holder.pid} on .* \(since .*\) is at work on it; wait"):
        with locked(tmp_path / "clip.mp4"):
            pass
    with locked(tmp_path / "other.mp4"):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path, holder):
    holder.kill()
    holder.wait()
    with locked(tmp_path / "clip.mp4"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_not_be_made_is_refused(tmp_path):
    """Where the system says "file exists" or "no such file", as it does where another process is at work on the folder."""
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in (tmp_path / "link", Path("/proc/nowhere")):
        with pytest.raises(InputError, match="can't be made"), locked(place / "clip.mp4"):
            pass


def test_nothing_is_left_and_it_can_be_taken_again(tmp_path):
    for _ in range(2):
        with locked(tmp_path / "new" / "clip.mp4"), pytest.raises(InputError, match="is at work on it"):
            with locked(tmp_path / "new" / "clip.mp4"):
                pass
    assert not (tmp_path / "new").exists()


def test_a_lock_whose_file_is_removed_meanwhile_is_not_taken_for_one(tmp_path):
    """Many processes that take it in turns: never are two inside."""
    script = (
        "import os, sys, time; from pathlib import Path\n"
        "from tpuvid.errors import InputError; from tpuvid.files.locks import locked\n"
        "path = Path(sys.argv[1]); inside = path.with_name('inside'); entered = 0\n"
        "end = time.time() + 3\n"
        "while time.time() < end:\n"
        "  try:\n"
        "    with locked(path):\n"
        "      os.close(os.open(inside, os.O_CREAT | os.O_EXCL)); os.unlink(inside); entered += 1\n"
        "  except InputError: pass\n"
        "print(entered)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "x")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    entered = [int(process.communicate()[0]) for process in processes]
    assert all(process.returncode == 0 for process in processes) and min(entered) > 10
