"""Files appear whole or not at all, and what can't be written is refused before the work."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tpuvid.errors import InputError, TpuvidError
from tpuvid.files.locks import temporary_prefix


@contextmanager
def atomic_path(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place once it is complete; a killed run leaves `path` as it was.

    Raises `InputError` if `path` exists and `overwrite` is false, `TpuvidError` if the disk refuses the write.
    """
    check_output(path, overwrite=overwrite)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=temporary_prefix(), suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        publish(temporary, path, overwrite=overwrite)
    except OSError as error:
        raise TpuvidError(
            f"{path}: can't be written ({error.strerror or error}); free space or choose another place"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path, *, overwrite: bool) -> None:
    """Give a complete file its name; raises `InputError` if another process made `path` meanwhile and `overwrite` is false.

    Both are on one file system; `temporary` may be left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.chmod(0o666 & ~_umask())  # whoever made it may have kept it to itself
    if not overwrite:
        try:
            os.link(temporary, path)  # unlike rename, fails if another process made `path` meanwhile
            return
        except FileExistsError:
            raise InputError(f"{path}: already exists; choose another name or pass --overwrite") from None
        except OSError:  # a file system without hard links
            pass
    temporary.replace(path)


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise `InputError` if `path` can't be written as asked: to be called before the work whose result goes there."""
    try:
        exists, is_folder = os.path.lexists(path), path.is_dir()  # a link that leads nowhere is there too
    except OSError as error:
        raise InputError(f"{str(path)[:80]}…: is no usable file name ({error.strerror}); choose a shorter one") from None
    if is_folder:
        raise InputError(f"{path}: is a folder; give a file name")
    if exists and not overwrite:
        raise InputError(f"{path}: already exists; choose another name or pass --overwrite")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir():
        raise InputError(f"{path}: {parent} is a file, not a folder; choose another place")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise InputError(f"{path}: {parent} is not writable ({error.strerror}); choose another place") from None


def check_folder(path: Path) -> None:
    """Make the folder `path` where it does not exist; raise `InputError` if no files can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"{path}: is no folder to write to ({error.strerror}); choose another") from None


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_json(path: Path, value: Mapping[str, Any], *, overwrite: bool) -> None:
    with atomic_path(path, overwrite=overwrite) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
