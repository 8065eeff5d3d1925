"""Settings out of text: metadata of files, JSON, tables of prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpuvid.contract.settings import SETTINGS
from tpuvid.errors import InputError


def boolean(text: str | bool) -> bool:
    """Read "true" or "false", in any case; raises `KeyError` for anything else."""
    return {"true": True, "false": False}[str(text).lower()]


_TODAY = {old: name for name, each in SETTINGS.items() for old in each.old_names}


def parse_settings(raw: Mapping[str, Any], source: Path | str, remedy: str = "make the file again") -> dict[str, Any]:
    """Settings with today's names and types out of metadata strings or JSON; unknown keys are left out."""
    settings = {}
    for key, value in raw.items():
        name = _TODAY.get(key, key)
        if name not in SETTINGS or value is None or (name != key and name in raw):
            continue
        if value == "None" and SETTINGS[name].may_be_none:
            continue
        kind = boolean if SETTINGS[name].kind is bool else SETTINGS[name].kind
        try:
            settings[name] = kind(value)
        except (TypeError, ValueError, KeyError):
            raise InputError(f"{source}: {key}={value!r} is no {kind.__name__}; {remedy}") from None
    return settings
