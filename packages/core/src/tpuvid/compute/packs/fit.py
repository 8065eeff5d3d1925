"""Whether a pack's key fits a run and, where it doesn't, what differs and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpuvid.contract.options import OPTIONS
from tpuvid.contract.settings import SETTINGS
from tpuvid.files.versions import LIBRARIES

FLAGS = {name for table in (SETTINGS, OPTIONS) for name, each in table.items() if each.programs}
"""Fields that a flag of the same name sets."""
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


def mismatch(key: Mapping[str, Any], run: Mapping[str, Any]) -> str | None:
    """The fields in which `run` differs from what a pack's `key` says, and what to do; None where it fits."""
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
    flag = f"--{name.replace('_', '-')}"
    if name in FLAGS and theirs is not None:
        without = dict.fromkeys(("none", "own", "off"), f"leave out {flag}") | {"on": f"pass {flag}"}
        return f"{without.get(str(theirs), f'pass {flag} {_flag(theirs)}')}, or {AGAIN}"
    if name in LIBRARIES and theirs:
        return f"install {name}=={theirs}, or {AGAIN}"
    if name in VARIABLES:
        return f"{f'set {name}={theirs!r}' if theirs else f'unset {name}'}, or {AGAIN}"
    guidance = {"on": "pass a --guidance-scale above 1", "off": "pass --guidance-scale 1"}
    return f"{guidance[theirs]}, or {AGAIN}" if name == "guidance" and theirs in ("on", "off") else AGAIN


def _flag(value: Any) -> str:
    return str(value).replace(" ", "")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
