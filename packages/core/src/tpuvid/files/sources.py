"""Hashes of the sources of packages."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@cache
def sources_hash(*packages: str) -> str:
    """A hash of code and of data tables, whichever the packages hold, but not of bundled configs and weights."""
    digest = hashlib.sha256()
    for package in packages:
        root, paths = _package(package)
        for path in paths:
            digest.update(f"{package}/{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _package(name: str) -> tuple[Path, Iterable[Path]]:
    """The folder of a package, or of a module, and its files."""
    spec = find_spec(name)
    assert spec is not None, f"{name} has been imported"
    if spec.submodule_search_locations:
        root = Path(next(iter(spec.submodule_search_locations)))
        return root, _sources(root)
    assert spec.origin is not None, f"{name} is a file"
    return Path(spec.origin).parent, [Path(spec.origin)]


def _sources(root: Path) -> Iterable[Path]:
    """A package's modules and, in a package of kernels, its tables."""
    tables = root.rglob("kernels/**/*.json") if root.name != "kernels" else root.rglob("*.json")
    return sorted([*root.rglob("*.py"), *tables])
