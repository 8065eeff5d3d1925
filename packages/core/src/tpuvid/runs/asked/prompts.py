"""Prompts out of files and stdin, each with settings of its own. Imports neither jax nor torch."""

from __future__ import annotations

import csv
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tpuvid.contract.parser import parse_settings
from tpuvid.contract.paths import path_of
from tpuvid.contract.settings import SETTINGS, cleaned
from tpuvid.errors import InputError
from tpuvid.files.texts import read_json_text, read_yaml_text
from tpuvid.runs.asked.items import MOST_ITEMS, NAME, RESERVED, Item, setting_name

STDIN = "-"
Rows = Iterator[tuple[str, Any]]
"""Where each prompt stands, for messages, with the prompt alone or a mapping of names of settings."""


def read_prompts(path: str) -> list[Item]:
    """The prompts of a file, by the ending of its name.

    A line of ``.txt`` is a prompt; ``.csv`` and ``.tsv`` have a heading with ``prompt`` and names of settings; ``.jsonl`` has
    an object of such names per line; ``.json`` and ``.yaml`` hold one of these, or a list of them or of prompts. ``output``
    names the mp4. "-" is stdin, read as what it looks like.

    Raises `InputError`, naming the place, for anything else.
    """
    name = "stdin" if path == STDIN else path
    try:
        text = sys.stdin.read() if path == STDIN else path_of(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: can't be read ({error}); needs a text file of prompts in UTF-8") from None
    text = text.removeprefix("\ufeff")
    ending = _looks_like(text) if path == STDIN else Path(path).suffix.lower()
    if ending not in READERS:
        raise InputError(f"{name}: prompts come as {', '.join(READERS)}; give the file a name that ends so")
    items = [_item(where, row) for where, row in itertools.islice(READERS[ending](name, text), MOST_ITEMS + 1)]
    if not items:
        raise InputError(f"{name}: holds no prompt; needs one per line")
    if len(items) > MOST_ITEMS:
        raise InputError(f"{name}: holds more than {MOST_ITEMS} prompts; split the file")
    return items


def _looks_like(text: str) -> str:
    """The ending that a file of this text would have: ".txt", unless it begins as another kind does."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    if first.lstrip().startswith("{"):
        return ".jsonl" if _is_json(first) else ".json"
    if re.match(r"\s*\[\s*($|[\"{\[\]])", first):
        return ".json"
    if re.match(r"(- )?prompt:(\s|$)", first):
        return ".yaml"
    for ending, separator in ((".tsv", "\t"), (".csv", ",")):
        if "prompt" in (cells := [cell.strip().strip('"') for cell in first.split(separator)]) and len(cells) > 1:
            return ending
    return ".txt"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _lines(name: str, text: str) -> Rows:
    return ((f"{name}, line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip())


def _table(separator: str) -> Callable[[str, str], Rows]:
    def rows(name: str, text: str) -> Rows:
        lines = (f"{line}\n" for line in text.split("\n"))  # and at nothing else that Python takes for the end of a line
        reader = csv.DictReader(lines, delimiter=separator, strict=True, skipinitialspace=True)
        try:
            heading = reader.fieldnames or []
            if len(set(heading)) < len(heading):
                raise InputError(f"{name}, line 1: gives a setting twice")
            for row in reader:
                where = f"{name}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise InputError(f"{where}: has not as many cells as the heading; quote cells with commas in them")
                if any(value.strip() for value in row.values()):
                    yield where, {key: value for key, value in row.items() if value.strip()}
        except csv.Error as error:
            raise InputError(f"{name}, line {reader.line_num}: is no CSV ({error})") from None

    return rows


def _json_lines(name: str, text: str) -> Rows:
    for where, line in _lines(name, text):
        row = _json(where, line)
        if not isinstance(row, dict):
            raise InputError(f'{where}: is no JSON object; needs {{"prompt": "…", "seed": 1}}')
        yield where, row


def _json_whole(name: str, text: str) -> Rows:
    return _several(name, _json(name, text))


def _yaml(name: str, text: str) -> Rows:
    return _several(name, read_yaml_text(name, text))


def _json(where: str, text: str) -> Any:
    try:
        return read_json_text(where, text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is no JSON ({error})") from None


def _several(name: str, value: Any) -> Rows:
    """The rows of one value of a whole file: a list of them, or one."""
    if not isinstance(value, list):
        yield name, value
        return
    for number, row in enumerate(value, 1):
        yield f"{name}, entry {number}", row


READERS: dict[str, Callable[[str, str], Rows]] = {
    ".txt": _lines, ".csv": _table(","), ".tsv": _table("\t"), ".jsonl": _json_lines, ".ndjson": _json_lines,
    ".json": _json_whole, ".yaml": _yaml, ".yml": _yaml,
}  # fmt: skip


def _item(where: str, row: Any) -> Item:
    row = {"prompt": row} if isinstance(row, str) else row
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: is {str(row)[:40]!r}; needs a prompt in quotes, or names of settings with their values")
    named = ((setting_name(where, key, (*SETTINGS, "output")), value) for key, value in row.items() if value is not None)
    values = {name: cleaned(name, value) for name, value in named}
    if len(values) < sum(value is not None for value in row.values()):
        raise InputError(f"{where}: gives a setting twice")
    output = values.pop("output", None)
    if not isinstance(values.get("prompt"), str) or not values["prompt"].strip():
        raise InputError(f"{where}: has no prompt")
    if output is not None and not (isinstance(output, str) and NAME.fullmatch(output) and not output.startswith(".")):
        raise InputError(f"{where}: output={output!r}: needs the plain name of a file; the folder is --output-dir")
    if output is not None and output.removesuffix(".mp4").lower() in RESERVED:
        raise InputError(f"{where}: output={output!r}: is kept for another file of the folder; choose another name")
    text = {name: value for name, value in values.items() if isinstance(value, str)}
    return Item(values | parse_settings(text, where, "change the line"), where, output)
