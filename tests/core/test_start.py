"""What a process does before its work, and after it."""

import subprocess
import sys

import pytest

IMPORT = """
import time
start = time.process_time()
import tpuvid
print(time.process_time() - start)
"""


def test_importing_the_package_takes_no_time():
    """Under 0.2 s of a CPU: nobody waits for it in a REPL."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.2


LEAVING = """
import atexit, sys, threading, time
from tpuvid.cli.leave import leave
atexit.register(lambda: print("at exit"))
threading.Thread(target=lambda: (time.sleep(0.2), print("thread done"))).start()
class Slow:
    def __del__(self): print("taken apart")
kept = Slow()
{before}
print("last words", end="")
leave({code})
"""


@pytest.mark.parametrize(
    "before, code, out",
    [
        ("", 0, "last wordsthread done\nat exit\n"),
        ("", 3, "last wordsthread done\nat exit\n"),
        ("sys.stdout.close(); sys.stdout = None; print = lambda *a, **k: None", 3, ""),
    ],
)
def test_the_process_ends_with_its_code_its_threads_and_what_is_to_be_done_at_exit(before, code, out):
    done = subprocess.run([sys.executable, "-c", LEAVING.format(before=before, code=code)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, "")
