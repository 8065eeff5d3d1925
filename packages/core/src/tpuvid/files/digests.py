"""Hashes of files, and JSON that carries a hash of itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpuvid.contract.digests import digest_of
from tpuvid.errors import InputError


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-ready `value`, as JSON gives it back, with a checksum of itself."""
    plain = json.loads(json.dumps(value))
    return plain | {"checksum": digest_of(plain)}


def check_seal(path: Path, value: Mapping[str, Any], remedy: str) -> None:
    """Raise `InputError` unless the JSON of `path` is as it was sealed."""
    if value.get("checksum") != digest_of({name: item for name, item in value.items() if name != "checksum"}):
        raise InputError(f"{path}: is damaged (its checksum is another); {remedy}")
