"""Whether a pack's key fits a run and, where it doesn't, what differs and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpuvid.files.versions import LIBRARIES

FLAGS = ("height", "width", "num_frames", "max_sequence_length", "cache", "window_size", "mesh", "dtype", "attention_backend",
         "text_encoder_device")  # fmt: skip
"""Fields that a flag of the same name sets."""
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


def mismatch(key: Mapping[str, Any], run: Mapping[str, Any]) -> str | None:
    """In which of its fields `run` differs from what a pack's `key` says, and what to do; None where it fits."""
    differ = {}
    for name, value in run.items():
        found = _difference(name, key.get(name), value)
        if found is not None:
            differ[name] = found
    if not differ:
        return None
    incurable = (name for name, (_, theirs, _) in differ.items() if _remedy(name, theirs) == AGAIN)
    name = next(incurable, next(iter(differ)))
    label, theirs, ours = differ.pop(name)
    others = f" ({', '.join(differ)} differ too)" if differ else ""
    return f"{label}={_short(theirs)}, this run has {label}={_short(ours)}{others}; {_remedy(name, theirs)}"


def _difference(name: str, theirs: Any, ours: Any) -> tuple[str, Any, Any] | None:
    """(what differs, the pack's value, this run's), of one field; None where they agree.

    A config's entry that only one side has is unknown to the module's class, which fills in all that it knows: it is left out.
    """
    if name != "configs":
        return None if theirs == ours else (name, theirs, ours)
    theirs = theirs or {}
    for stage, configs in ours.items():
        if len(theirs.get(stage, ())) != len(configs):
            return f"configs of {stage}", theirs.get(stage), configs
        for a, b in zip(theirs[stage], configs, strict=True):
            for entry in a.keys() & b.keys():
                if a[entry] != b[entry]:
                    return f"configs: {stage}: {entry}", a[entry], b[entry]
    return None


AGAIN = "make a pack for this run with tpuvid compile"


def _remedy(name: str, theirs: Any) -> str:
    if name in FLAGS and theirs not in ("none", None):
        return f"pass --{name.replace('_', '-')} {_flag(theirs)}, or {AGAIN}"
    if name in LIBRARIES and theirs:
        return f"install {name}=={theirs}, or {AGAIN}"
    if name in VARIABLES:
        return f"{f'set {name}={theirs!r}' if theirs else f'unset {name}'}, or {AGAIN}"
    switches = {
        "guidance": {"on": "pass a --guidance-scale above 1", "off": "pass --guidance-scale 1"},
        "vae_tiling": {"on": "pass --vae-tiling", "off": "leave out --vae-tiling"},
        "cache": {"none": "leave out --cache"},
        "window_size": {"none": "leave out --window-size"},
        "decoder": {"own": "leave out --decoder"},
    }
    switch = switches.get(name, {}).get(str(theirs))
    return f"{switch}, or {AGAIN}" if switch else AGAIN


def _flag(value: Any) -> str:
    return str(value).replace(" ", "")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
