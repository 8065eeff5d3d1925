"""What is said of a setting, once, where its field is: checks, flags, keys, what files hold and what a sweep may vary are
derived from it. Imports neither jax nor torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from tpuvid.errors import InputError

NEEDS: dict[Any, str] = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a string", Path: "a path"
}  # fmt: skip
"""What a value of each type is called in messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting of a video (`GenerationConfig`), or one option of how it is computed (`Options`)."""

    name: str = ""
    kind: type = str
    may_be_none: bool = False
    default: Any = MISSING
    help: str | None = None
    also: tuple[str, ...] = ()
    """Flags beside the one of its name."""
    metavar: str | None = None
    show_default: bool = False
    """Whether ``--help`` says it: not where models have their own."""
    range: tuple[Any, Any] | None = None
    """Its smallest and its largest value."""
    choices: tuple[str, ...] = ()
    reads: Callable[[Any], Any] | None = None
    """What makes something of a value, where it has a form of its own; raises `InputError`."""
    rule: str | None = None
    """What is right, for people, where type, range and choices don't say it."""
    old_names: tuple[str, ...] = ()
    """Its names in files of earlier tools."""
    enters: tuple[str, ...] = ()
    """The stages whose results depend on it."""
    programs: bool = False
    """Whether the programs of those stages are other ones for another value."""
    calls: bool = False
    """Whether it decides how often programs run."""
    per_video: bool = False
    """Whether videos that are denoised together may differ in it."""
    private: bool = False
    """Whether it is left out of records and names, where the user wants that, and can't be swept."""
    takes: str | None = None
    """What a model must have that takes it; None: every model does."""
    recorded: bool = False
    """Whether the record of a video, by which it is made again, names this option."""
    portable: bool = False
    """Whether a run may go on with another value of this option."""
    partner: str | None = None
    """The setting without which it means nothing, and is refused."""
    examples: tuple[Any, ...] = ()
    """Two values with which a model that takes it makes other latents."""

    @property
    def flags(self) -> tuple[str, ...]:
        return f"--{self.name.replace('_', '-')}", *self.also

    @property
    def needs(self) -> str:
        """What is right, for people."""
        if self.rule or self.choices:
            return self.rule or f"choose from {', '.join(self.choices)}"
        least, most = self.range or (None, None)
        bounds = "" if least is None else f" ≥ {least}" if most is None else f" from {least} to {most}"
        return f"needs {NEEDS[self.kind]}{bounds}"

    def check(self, value: Any) -> None:
        """Raise `InputError` for a value of another type, out of the range or none of the choices."""
        if value is None and self.may_be_none:
            return
        if self.reads is not None:
            self.reads(value)
            return
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            raise InputError(f"{self.name}={value[:40]!r}: holds bytes that are no UTF-8; write it in UTF-8")
        if not (isinstance(value, self.types) and isinstance(value, bool) == (self.kind is bool) and self._is_within(value)):
            raise InputError(f"{self.name}={repr(value)[:40]}: {self.needs}")

    @property
    def types(self) -> tuple[type, ...]:
        return {float: (float, int), Path: (Path, str), Any: (object,)}.get(self.kind, (self.kind,))

    def _is_within(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        least, most = self.range or (None, None)
        return (least is None or value >= least) and (most is None or value <= most)


def in_key(value: Any) -> Any:
    """The value as what depends on programs has it, and as `tpuvid.compute.packs.fit` says which flag to pass."""
    return {None: "none", True: "on", False: "off"}[value] if value is None or isinstance(value, bool) else value


def setting(default: Any = MISSING, **about: Any) -> Any:
    """A field of a dataclass with what is said of it: `about` are the fields of `Setting`."""
    return field(default=default, metadata={"setting": Setting(default=default, **about)})


def check_partners(table: Mapping[str, Setting], values: Any) -> None:
    """Raise `InputError` for a value that is given to a setting whose partner has none."""
    for name, each in table.items():
        value = getattr(values, name)
        if each.partner and value not in (None, False) and getattr(values, each.partner) is None:
            flag, partner = each.flags[0], table[each.partner].flags[0]
            raise InputError(f"{name}={value}: means nothing without {each.partner}; add {partner}, or leave out {flag}")


def table_of(kind: type) -> dict[str, Setting]:
    """What a dataclass says of its fields, by name; their types are those of the annotations."""
    hints = get_type_hints(kind)
    found = {}
    for each in fields(kind):
        kinds: Any = get_args(hints[each.name]) or (hints[each.name],)
        of_values = next(kind for kind in (Any, bool, int, float, Path, str) if kind in kinds)
        found[each.name] = replace(each.metadata["setting"], name=each.name, kind=of_values, may_be_none=NoneType in kinds)
    return found
