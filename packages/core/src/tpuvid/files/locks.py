"""One process at a time for files that two would spoil for each other; a process that is killed leaves no lock behind."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tpuvid.errors import InputError

TRIES = 1000
"""How often a lock is tried whose folder others remove meanwhile, each time at most once for each of them."""
WORK_FOLDER = ".tpuvid"
"""Beside the results: locks, and work that is not done yet."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """`path`, which need not exist, for this process alone.

    Raises `InputError` where another process has it, saying which, and where no lock can be had.
    """
    folder = path.parent if path.parent.name == WORK_FOLDER else path.parent / WORK_FOLDER
    lock = folder / f"{path.name}.lock"
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    handle = _acquire(lock, path)
    try:
        for place in {path.parent, folder}:
            remove_abandoned(place)
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is still held: whoever opened it sees below that it is gone
        os.close(handle)
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


def _acquire(lock: Path, path: Path) -> int:
    for _ in range(TRIES):
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except (FileNotFoundError, FileExistsError) as error:  # another process has removed the folder in between
            if lock.parent.is_file():
                raise InputError(f"{lock.parent}: is a file, and a folder is needed; choose another place") from error
        except OSError as error:
            raise InputError(f"{lock}: can't be made ({error.strerror}); choose another place") from None
        else:
            if _take(handle, lock, path):
                return handle
            os.close(handle)
    raise InputError(f"{lock}: can't be made (its folder can't, or is removed all the time); choose another place")


def _take(handle: int, lock: Path, path: Path) -> bool:
    """False where the lock file is not the one of that name any more."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is(lock, handle):
            return False
        os.truncate(handle, 0)
        os.write(handle, json.dumps(_who()).encode())
        return True
    except BlockingIOError:
        holder = _holder(handle)
        os.close(handle)
        raise InputError(f"{path}: {holder} is at work on it; wait for that to end, or choose another place") from None
    except OSError as error:
        os.close(handle)
        raise InputError(f"{lock}: can't be locked ({error.strerror}); choose another place") from None


def _is(lock: Path, handle: int) -> bool:
    """Whether the file that was locked is still the one of that name."""
    try:
        return os.path.samestat(lock.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _who() -> dict[str, str | int]:
    return {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _holder(handle: int) -> str:
    try:
        who = json.loads(os.pread(handle, 1000, 0))
        return f"process {who['process']} on {who['host']} (since {who['since']})"
    except (ValueError, KeyError, TypeError):
        return "another process"
