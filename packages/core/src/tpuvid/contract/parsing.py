"""Settings out of text: metadata of files, JSON, tables of prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tpuvid.errors import InputError


def boolean(text: str | bool) -> bool:
    return {"True": True, "False": False}[str(text)]


_OLD_NAMES = {"frames": "num_frames", "video_length": "num_frames", "steps": "num_inference_steps", "shift": "flow_shift"}
_TYPES: dict[str, Callable[[str], Any]] = {
    "height": int, "width": int, "num_frames": int, "fps": int, "num_inference_steps": int, "seed": int,
    "max_sequence_length": int, "guidance_scale": float, "flow_shift": float,
    "prompt": str, "negative_prompt": str, "use_dynamic_cfg": boolean,
    "cache": str, "cache_start_step": int, "cache_end_step": int, "cache_step_interval": int,
    "window_size": str,
}  # fmt: skip


def parse_settings(raw: Mapping[str, Any], source: Path | str, remedy: str = "make the file again") -> dict[str, Any]:
    """Settings with today's names and types out of metadata strings or JSON; unknown keys are left out."""
    settings = {}
    for key, value in raw.items():
        name = _OLD_NAMES.get(key, key)
        if name not in _TYPES or value is None or value == "None" or (name != key and name in raw):
            continue
        try:
            settings[name] = _TYPES[name](value)
        except (TypeError, ValueError, KeyError):
            raise InputError(f"{source}: {key}={value!r} is no {_TYPES[name].__name__}; {remedy}") from None
    return settings
