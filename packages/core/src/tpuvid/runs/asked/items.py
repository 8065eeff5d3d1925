"""What is to be made: items with settings of their own, several videos of each, sweeps over settings. Imports neither jax nor
torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tpuvid.contract.parser import parse_settings
from tpuvid.contract.settings import SETTINGS
from tpuvid.contract.wording import suggestion
from tpuvid.errors import InputError

ALIASES = {other.lstrip("-").replace("-", "_"): name for name, each in SETTINGS.items() for other in each.also}
ALIASES |= {"output_name": "output"}
MOST_ITEMS = 100_000
NAME = re.compile("[^\0-\x1f/\\\\\ud800-\udfff]{1,200}")
RESERVED = ("batch", "batch.preview", "sweep", "index", "stage3_frames")
"""Names that stand in the folder for something else."""


@dataclass(frozen=True, slots=True)
class Item:
    """One video that is asked for; what it leaves open is the command's or the model's to say."""

    settings: Mapping[str, Any]
    where: str = ""
    """Where it was asked for, for messages: "prompts.csv, line 3"."""
    output: str | None = None
    """Name of the mp4."""
    swept: Mapping[str, Any] = field(default_factory=dict)
    """Those of `settings` that a sweep gave."""

    def raise_as(self, error: InputError) -> None:
        raise InputError(f"{self.where}: {error}" if self.where else str(error)) from None


def setting_name(where: str, given: str, known: Sequence[str]) -> str:
    """The setting that is called so, in whatever spelling; raises `InputError`."""
    name = str(given).strip().lstrip("-").replace("-", "_")
    name = ALIASES.get(name, name)
    if name not in known:
        raise InputError(f"{where}: {given!r} is no setting; {suggestion(name, known)}")
    return name


def several(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    """`count` videos of each, with seeds that follow one another; `seed` is the first where an item gives none."""
    if count == 1:
        return list(items)
    return [_with_seed(item, item.settings.get("seed", seed), i) for item in items for i in range(count)]


def _with_seed(item: Item, first: Any, number: int) -> Item:
    if type(first) is not int:
        raise InputError(f"{item.where}: seed={first!r}: needs a whole number")
    return replace(
        item, settings={**item.settings, "seed": first if first == -1 else first + number}, output=_numbered(item, number)
    )


def _numbered(item: Item, number: int) -> str | None:
    if item.output is None or not number:
        return item.output
    path = Path(item.output)
    return f"{path.stem}_{number + 1}{path.suffix}"


def parse_sweep(words: Sequence[str]) -> dict[str, list[Any]]:
    """Read "seed=0..7" (both ends) and "guidance_scale=4,5,6"; raises `InputError`."""
    axes: dict[str, list[Any]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        known = [setting for setting, about in SETTINGS.items() if not about.private]
        if not equals or not text:
            raise InputError(f"sweep {word!r}: needs a setting and its values, as in seed=0..7 or guidance_scale=4,5,6")
        name = setting_name(f"sweep {word!r}", name, known)
        if name in axes:
            raise InputError(f"sweep {word!r}: {name} is given twice; give all its values at once")
        axes[name] = _values(word, name, text)
    combinations = 1
    for values in axes.values():
        combinations *= len(values)
    if combinations > MOST_ITEMS:
        raise InputError(f"sweep: {combinations} combinations; needs {MOST_ITEMS} or fewer")
    return axes


def _values(word: str, name: str, text: str) -> list[Any]:
    values: list[Any] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(-?\d{1,18})\.\.(-?\d{1,18})\s*", part)
        if ends:
            low, high = int(ends[1]), int(ends[2])
            if not 0 <= high - low < MOST_ITEMS:
                raise InputError(f"sweep {word!r}: {part} needs its smaller end first, and {MOST_ITEMS} values or fewer")
            values += [str(n) for n in range(low, high + 1)]
        else:
            values.append(part.strip())
    if "" in values or len(set(values)) < len(values):
        raise InputError(f"sweep {word!r}: a value is empty or given twice")
    found = [parse_settings({name: value}, f"sweep {word!r}", "change the value").get(name) for value in values]
    if None in found:
        raise InputError(f"sweep {word!r}: None is no value; leave it out")
    return found


def swept(items: Sequence[Item], axes: Mapping[str, Sequence[Any]]) -> list[Item]:
    """Every item with every combination of values."""
    if not axes:
        return list(items)
    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if any(item.output for item in items):
        raise InputError("output: names one file, and a sweep makes many; leave it out")
    return [replace(item, settings={**item.settings, **values}, swept=values) for item in items for values in combinations]


def label(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
