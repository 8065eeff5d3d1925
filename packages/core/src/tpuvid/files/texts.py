"""JSON and YAML: what stands there is what is meant, and nothing is said twice."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpuvid.errors import InputError

if TYPE_CHECKING:
    from yaml.nodes import Node


def read_json_text(where: str | Path, text: str | bytes, remedy: str = "say it once") -> Any:
    """The value of JSON. Raises `InputError` for a key given twice, `ValueError` and `RecursionError` as `json.loads` does."""
    return json.loads(text, object_pairs_hook=lambda pairs: _unique(where, pairs, remedy))


def _unique(where: str | Path, pairs: Iterable[tuple[Hashable, Any]], remedy: str = "say it once") -> dict[Any, Any]:
    """The mapping of `pairs`; raises `InputError` for a key that stands there twice."""
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f"{where}: gives {str(key)[:80]!r} twice; {remedy}")
        found[key] = value
    return found


def read_yaml_text(where: str | Path, text: str) -> Any:
    """Lists, mappings and text. Every scalar stays the text that it is written as ("12:30", "010", "yes"); a plain "", "~" or
    "null" is None. Raises `InputError` for what is no YAML, for a key given twice, and for a value that holds itself."""
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
        return None if node is None else _value(where, node, {})
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{where}: is no readable YAML ({' '.join(str(error).split())})") from None


def _value(where: str | Path, node: Node, known: dict[int, Any]) -> Any:
    """`known` are the values of nodes that have been met: what is referred to often is made once."""
    if id(node) in known:
        if known[id(node)] is _OPEN:
            raise ValueError("a value that holds itself")
        return known[id(node)]
    known[id(node)] = _OPEN
    match node.id:
        case "sequence":
            value: Any = [_value(where, item, known) for item in node.value]
        case "mapping":
            value = _unique(where, ((_key(key), _value(where, item, known)) for key, item in node.value))
        case _:
            plain = getattr(node, "style", None) is None
            value = None if plain and node.value in ("", "~", "null") else node.value
    known[id(node)] = value
    return value


def _key(node: Node) -> str:
    if node.id != "scalar":
        raise ValueError("a key that is no text")
    return str(node.value)


_OPEN = object()
"""Stands for a value that is being made."""
