"""What an earlier process has worked out, in the user's cache, so that a later one need not work it out again.

An entry is a safetensors file: arrays, and JSON about them. Its name is a hash of all that it depends on, which the caller
gives. An entry that is damaged, that another user could have written, or whose library's sources have changed since, is made
again.

Imports neither jax nor torch.
"""

from __future__ import annotations

import json
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from tpuvid.contract.digests import digest_of, tensors_digest
from tpuvid.errors import TpuvidError
from tpuvid.files.atomic import atomic_path
from tpuvid.files.cache_folder import cache_folder

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1
HEADER = "tpuvid_kept"
UNUSED_DAYS = 30
"""Entries that no run has used for so long are removed when one is added."""


class Entry(NamedTuple):
    arrays: Mapping[str, np.ndarray]
    about: Any
    """What is kept beside the arrays, JSON-ready."""
    sources: Iterable[ModuleType] = ()
    """The modules whose code decided what it is, beside tpuvid's and the plugins'. Not read back."""


@dataclass(frozen=True)
class Kept:
    """Entries in `folder`; with None every one is made when it is asked for, and nothing is written.

    Who monkeypatches libraries must not use a folder: what is kept doesn't know of it.
    """

    folder: Path | None = None
    environment: Any = None
    """JSON-ready: what every entry depends on, beside `scope` and its own key."""
    scope: Any = None
    """JSON-ready: what all that is asked for depends on, beside its own key."""

    @classmethod
    def in_cache(cls, environment: Any) -> Kept:
        """Entries in the user's cache folder, or nowhere if that can't be written: what is kept is only ever a shortcut."""
        try:
            return cls(cache_folder("kept"), environment)
        except TpuvidError as error:
            warnings.warn(f"nothing is kept for the next start: {error}", stacklevel=2)
            return cls()

    def within(self, scope: Any) -> Kept:
        return replace(self, scope=scope)

    def get(self, kind: str, key: Any, make: Callable[[], Entry]) -> Entry:
        """The entry of `key` (JSON-ready), or else what `make` gives, kept."""
        found = self.find(kind, key)
        if found is None:
            self.add(kind, key, found := make())
        return found

    def find(self, kind: str, key: Any) -> Entry | None:
        if self.folder is None:
            return None
        path = self._path(kind, key)
        try:
            found = _read(path)
            os.utime(path)
        except FileNotFoundError:
            return None
        except Exception:  # whatever is wrong with a file that is only a shortcut: it is made again
            with suppress(OSError):
                path.unlink()
            return None
        return found

    def add(self, kind: str, key: Any, entry: Entry) -> None:
        """Write an entry; one that can't be written is given up."""
        if self.folder is None:
            return
        import numpy as np
        from safetensors.numpy import save

        path = self._path(kind, key)
        arrays = {name: np.ascontiguousarray(value) for name, value in entry.arrays.items()}
        header = {"format": FORMAT, "about": entry.about, "sources": _stamps(entry.sources)}
        header["digest"] = digest_of([header, tensors_digest(arrays)])
        try:
            with atomic_path(path, overwrite=True) as temporary:
                temporary.write_bytes(save(arrays, {HEADER: json.dumps(header)}))
            path.chmod(0o600)
            _remove_unused(self.folder)
        except (TpuvidError, OSError):
            pass

    def _path(self, kind: str, key: Any) -> Path:
        assert self.folder is not None, "nothing is kept without a folder"
        return self.folder / f"{kind}-{digest_of([FORMAT, self.environment, self.scope, key])[:32]}.safetensors"


def _read(path: Path) -> Entry:
    """Raises `ValueError` for a file that is not as this user's own process left it."""
    from safetensors.numpy import load

    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(handle, "rb") as file:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o022:
            raise ValueError("another user could have written it")
        data = file.read()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][HEADER])
    arrays = load(data)
    if header.pop("digest") != digest_of([header, tensors_digest(arrays)]):
        raise ValueError("it is damaged")
    if any(_stamp(package, name) != [size, changed] for package, name, size, changed in header["sources"]):
        raise ValueError("its sources have changed")
    return Entry(arrays, header["about"])


def _stamps(modules: Iterable[ModuleType]) -> list[list[Any]]:
    """[package, file in it, size, time of change] of each module's source."""
    found = []
    for module in modules:
        package = module.__name__.split(".")[0]
        root = _root(package)
        file = getattr(module, "__file__", None)
        if root is not None and file and Path(file).is_relative_to(root):
            name = Path(file).relative_to(root).as_posix()
            found.append([package, name, *_stamp(package, name)])
    return sorted(found)


def _stamp(package: str, name: str) -> list[int]:
    root = _root(package)
    if root is None:
        raise ValueError(f"{package} is not installed any more")
    about = (root / name).stat()
    return [about.st_size, about.st_mtime_ns]


@cache
def _root(package: str) -> Path | None:
    spec = find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def _remove_unused(folder: Path) -> None:
    import time

    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    for path in folder.glob("*.safetensors"):
        if path.stat().st_mtime < oldest:
            path.unlink(missing_ok=True)
