"""How a video was made, in five lines, out of its record. Imports neither jax nor torch."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from tpuvid.contract.options import OPTIONS
from tpuvid.contract.settings import SETTINGS
from tpuvid.plugin.registry import registry


def story(about: Mapping[str, Any]) -> list[str]:
    """Prompt; model and size; steps, guidance and seed; when, where and how long; the command that makes it again."""
    record, guidance = about["settings"], about["settings"].get("guidance_scale")
    size = f"{about['width']}x{about['height']}, {about['frames']} frames at {about['fps']:g} per second"
    return [
        f"prompt: {record.get('prompt', 'left out of the record')}",
        f"model: {record.get('model_id')}, {size}",
        f"made with: {record.get('num_inference_steps')} steps, guidance {guidance}, seed {record.get('seed')}",
        f"made: {_made(record)}",
        f"again: {command(record)}" + ("" if "prompt" in record else "  (with --prompt: the record leaves it out)"),
    ]


def _made(record: Mapping[str, Any]) -> str:
    stages = [stage for stage in _mapping(record, "history").values() if isinstance(stage, Mapping)]
    devices = list(dict.fromkeys(str(stage["devices"]) for stage in stages if "devices" in stage))
    times = [stage["seconds"] for stage in stages if isinstance(stage.get("seconds"), Mapping)]
    seconds = sum(value for each in times for value in each.values() if isinstance(value, int | float))
    when = str(record.get("created", "at a time that the record doesn't say")).replace("T", " ").replace("+00:00", " UTC")
    return f"{when}, on {'; '.join(devices) or 'unknown devices'}, in {seconds:.1f} s"


def command(record: Mapping[str, Any]) -> str:
    """The ``tpuvid generate`` whose settings are the record's, but for those that are the model's own anyway."""
    model = str(record.get("model_id"))
    defaults = next((s.defaults for p in registry().plugins for s in p.models if s.model_id == model), None)
    words = ["tpuvid", "generate", "--model", model]
    for table, values in ((SETTINGS, record), (OPTIONS, _mapping(record, "options"))):
        for name, about in table.items():
            value = values.get(name)
            own = getattr(defaults, name, None) if table is SETTINGS and not about.private and name != "seed" else about.default
            if value is None or value is False or value == own:
                continue
            words += [about.flags[0]] if value is True else [about.flags[0], str(value)]
    loras = record.get("loras")
    for lora in loras if isinstance(loras, list) else ():
        if isinstance(lora, Mapping):
            words += ["--lora-path", str(lora.get("path")), "--lora-scale", str(lora.get("scale"))]
    return shlex.join(words)


def _mapping(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of the record, which a stranger may have written."""
    return value if isinstance(value := record.get(name), Mapping) else {}
