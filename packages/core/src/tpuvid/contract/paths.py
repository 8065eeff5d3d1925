"""Paths as people write them. Imports neither jax nor torch."""

from __future__ import annotations

from pathlib import Path

from tpuvid.errors import InputError


def path_of(value: str | Path) -> Path:
    """The path, "~" being the user's home folder; raises `InputError` for the home of a user that is none here."""
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise InputError(f"{value}: no user is called so; write the folder out, or ./ before its name") from None
