"""Hashes of tensors, files and JSON, and JSON that carries a hash of itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tpuvid.errors import InputError


def tensors_digest(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(raw_bytes(value))
        digest.update(canonical([name, value.dtype.name, value.shape]))
    return digest.hexdigest()


def raw_bytes(value: np.ndarray) -> memoryview:
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """SHA-256 of JSON-ready data, whatever the order of its keys."""
    return hashlib.sha256(canonical(value)).hexdigest()


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-ready `value`, as JSON gives it back, with a checksum of itself."""
    plain = json.loads(json.dumps(value))
    return plain | {"checksum": digest_of(plain)}


def check_seal(path: Path, value: Mapping[str, Any], remedy: str) -> None:
    """Raise `InputError` unless the JSON of `path` is as it was sealed."""
    if value.get("checksum") != digest_of({name: item for name, item in value.items() if name != "checksum"}):
        raise InputError(f"{path}: is damaged (its checksum is another); {remedy}")


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
