"""What is refused of files that come from elsewhere: ways out of a checkpoint's folder, pickles, code, and headers and numbers
that no model has. Imports neither jax nor torch."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpuvid.errors import InputError
from tpuvid.files.texts import read_json_text

AGAIN = "download it again, from where you trust it"
MOST_JSON = 16 * 2**20
"""The most bytes of a config or an index; tokenizers are transformers' to read."""
MOST_HEADER = 32 * 2**20
"""The most bytes of a safetensors header: a thousand tensors take 0.1 MB."""
MOST = 2**24
"""The most that any whole number in a config may be: the largest published one is a vocabulary of 256,384."""
MOST_LAYERS = 1024
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"(dp", b"]q")
"""How files of ``torch.save`` and ``pickle.dump`` begin."""


def parse_json(path: Path, text: str | bytes) -> Any:
    """Raises `InputError` for what is no JSON, and for an object that gives a key twice."""
    try:
        return read_json_text(path, text, AGAIN)
    except RecursionError:
        raise InputError(f"{path}: is nested too deep to be a config; {AGAIN}") from None


def check_size(path: Path, most: int = MOST_JSON) -> None:
    """Raise `InputError` for a file that is too large to be read as a whole."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise InputError(f"{path}: is no plain file; {AGAIN}")
    if (size := about.st_size) > most:
        raise InputError(
            f"{path}: has {size:,} bytes, and {most:,} are the most that are read of such a file; download it again"
        )


def check_header(path: Path) -> None:
    """Raise `InputError` for a safetensors header that is larger than the file or than any model's, or gives a name twice."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
        length = int.from_bytes(start[:8], "little")
        if start.startswith(PICKLES) and start[8:] != b"{":  # a header of 896 bytes begins like a pickle, too
            raise InputError(
                f"{path}: is a pickle under another name, and is not read; "
                "convert it with save_pretrained(safe_serialization=True)"
            )
        if len(start) < 9 or length > size - 8:
            return  # truncated or foreign: safetensors says so
        if length > MOST_HEADER:
            raise InputError(
                f"{path}: has a header of {length:,} bytes, which no model needs; download it again, from where you trust it"
            )
        header = start[8:] + file.read(length - 1)
    try:
        parse_json(path, header)
    except ValueError:
        return


def check_links(root: Path, folder: Path) -> None:
    """Raise `InputError` for links in `folder` that lead out of the checkpoint `root`.

    Those of the Hub's own cache are as they should be: from ``snapshots/<commit>`` to ``blobs`` of the same repository.
    """
    root = root.resolve()
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    try:
        paths = [folder, *folder.rglob("*")]
    except FileNotFoundError as error:  # what was listed is gone
        raise InputError(f"{folder}: changes while it is read ({error}); give a folder that stays as it is") from None
    for path in paths:
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise InputError(f"{path}: leads nowhere ({error}); download it again") from None
        if not (target.is_file() or target.is_dir()):
            raise InputError(f"{path}: is neither a file nor a folder; {AGAIN}")
        if not any(target.is_relative_to(place) for place in allowed):
            raise InputError(f"{path}: is a link out of the checkpoint (to {target}); put the file itself there")


def check_code(path: Path, config: Mapping[str, Any]) -> None:
    """Raise `InputError` for a config that asks for code of its own."""
    if "auto_map" in config:
        raise InputError(
            f"{path}: asks to run code of its own (auto_map), which tpuvid never does; use a checkpoint without it"
        )


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raise `InputError` for a model's config that asks for code of its own, or has numbers that no model has."""
    check_code(path, config)
    for name, value in _numbers(config):
        most = MOST_LAYERS if name.endswith(("layers", "blocks", "depth")) else MOST
        if abs(value) > most:
            raise InputError(f"{path}: {name}={str(value)[:40]}: no model has more than {most:,}; download it again")


def _numbers(config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Every whole number, with the key that it stands under."""
    found: list[tuple[str, int]] = []
    waiting: list[tuple[str, Any]] = list(config.items())
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += ((name, item) for item in value)
        elif type(value) is int:
            found.append((name, value))
    return found
