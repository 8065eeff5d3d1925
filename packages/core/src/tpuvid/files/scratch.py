"""Folders for what is written on the way, removed afterwards, also after a kill."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX, LOCK = "tpuvid-job-", ".tpuvid-job"
"""What the names of scratch folders begin with, and the file in each that its owner has locked."""


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """A folder for what jobs write, removed afterwards; those of processes that were killed go too.

    It lies in `parent`, or where temporary files do.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    for lock in parent.glob(f"{PREFIX}*/{LOCK}"):
        with suppress(OSError), lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its owner lives
            shutil.rmtree(lock.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    with (folder / LOCK).open("w") as own:
        fcntl.flock(own, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
