"""Hashes of named arrays and of JSON-ready data. Imports neither jax nor torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def tensors_digest(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(raw_bytes(value))
        digest.update(canonical([name, value.dtype.name, value.shape]))
    return digest.hexdigest()


def raw_bytes(value: np.ndarray) -> memoryview:
    import numpy as np

    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


def digest_of(value: Any) -> str:
    """SHA-256 of JSON-ready data, whatever the order of its keys."""
    return hashlib.sha256(canonical(value)).hexdigest()


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
