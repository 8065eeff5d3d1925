"""One process at a time for files that two would spoil for each other; a process that is killed leaves no lock behind.

`filelock` locks. What it doesn't do is done here: who has a lock is said, in the file that is locked; and neither that file
nor a folder made for it stays, where `filelock` leaves both. It takes no lock on a file that was removed meanwhile, so that
who holds one may remove it.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tpuvid.errors import InputError

if TYPE_CHECKING:
    from filelock import FileLock

TRIES = 1000
"""How often a lock is tried whose folder others remove meanwhile, each time at most once for each of them."""
WORK_FOLDER = ".tpuvid"
"""The folder beside the results for locks, and for work that is not done yet."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """`path`, which need not exist, for this process alone.

    Raises `InputError` where another process has it, saying which, and where no lock can be had.
    """
    folder = path.parent if path.parent.name == WORK_FOLDER else path.parent / WORK_FOLDER
    lock = folder / f"{path.name}.lock"
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    held = _acquire(lock, path)
    try:
        for place in {path.parent, folder}:
            remove_abandoned(place)
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is still held: whoever has opened it sees that it is gone
        held.release()
        for place in (folder, *new):
            remove_if_empty(place)


def temporary_prefix() -> str:
    """How the names of this process's unfinished files begin."""
    return f".tpuvid-{_host()}-{os.getpid()}-"


def remove_abandoned(folder: Path) -> None:
    """Remove unfinished files of processes of this machine that are no more."""
    for path in folder.glob(f".tpuvid-{_host()}-*"):
        process = path.name.removeprefix(f".tpuvid-{_host()}-").partition("-")[0]
        if process.isdecimal() and not _is_running(int(process)):
            path.unlink(missing_ok=True)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "", socket.gethostname())[:40] or "host"


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:  # somebody's work is in it, or it is gone
        pass


def _acquire(lock: Path, path: Path) -> FileLock:
    from filelock import FileLock, Timeout

    held = FileLock(lock, blocking=False, fallback_to_soft=False, on_acquired=_sign)
    reason = "others remove it all the time"
    for _ in range(TRIES):
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)  # filelock would also make what a dangling link names
            held.acquire()
            return held
        except Timeout:
            if lock.exists():  # or else whoever had it has just removed it
                raise InputError(
                    f"{path}: {_holder(lock)} is at work on it; wait for that to end, or choose another place"
                ) from None
        except (FileNotFoundError, FileExistsError) as error:  # another process has removed the folder in between
            if lock.parent.is_file():
                raise InputError(f"{lock.parent}: is a file, and a folder is needed; choose another place") from error
            reason = error.strerror or reason
        except OSError as error:
            raise InputError(f"{lock}: can't be made or locked ({error.strerror}); choose another place") from None
    raise InputError(f"{path}: {lock.parent} can't be made beside it ({reason}); choose another place")


def _sign(handle: int) -> None:
    """Write into the file that was just locked who has it."""
    os.truncate(handle, 0)
    os.pwrite(handle, json.dumps(_who()).encode(), 0)


def _who() -> dict[str, str | int]:
    return {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _holder(lock: Path) -> str:
    try:
        who = json.loads(lock.read_bytes()[:1000])
        return f"process {who['process']} on {who['host']} (since {who['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
