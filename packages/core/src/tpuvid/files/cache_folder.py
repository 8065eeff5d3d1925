"""Where the user's caches are."""

from __future__ import annotations

import os
from pathlib import Path

from tpuvid.contract.paths import path_of
from tpuvid.errors import InputError

CACHE_VARIABLE = "TPUVID_CACHE_DIR"


def cache_folder(name: str) -> Path:
    """The folder of that name in TPUVID_CACHE_DIR (default: the user's cache folder), made; `InputError` where it can't be."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = path_of(os.environ.get(CACHE_VARIABLE) or home / "tpuvid") / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: can't be made ({error.strerror}); set {CACHE_VARIABLE} to a writable folder") from None
    return folder
