"""What a stage file, a folder of them or a checkpoint holds, without loading any tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tpuvid.artifacts import CONFIG, read_config
from tpuvid.checkpoint import INDEX, read_json, readable_safetensors, weight_files
from tpuvid.errors import InputError


def describe(path: Path) -> dict[str, Any]:
    """A safetensors file, a diffusers checkpoint folder or a folder of stage files, as JSON-ready data.

    Raises `InputError` for anything else.
    """
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        raise InputError(f"{path}: does not exist")
    if (path / INDEX).exists():
        return _checkpoint(path)
    files = sorted(path.glob("*.safetensors"))
    if not files and not (path / CONFIG).exists():
        raise InputError(f"{path}: holds neither a {INDEX} nor safetensors files; give a stage file, a stage folder or a checkpoint")
    return {"kind": "folder", "path": str(path), "settings": read_config(path / CONFIG), "files": [_file(f) for f in files]}


def _file(path: Path) -> dict[str, Any]:
    if path.suffix == ".json":
        return {"kind": "settings", "path": str(path), "settings": read_config(path)}
    tensors, metadata = _header(path)
    return {"kind": "safetensors", "path": str(path), "tensors": tensors, "metadata": metadata}


def _header(path: Path) -> tuple[dict[str, dict], dict[str, Any]]:
    from safetensors import safe_open

    with readable_safetensors(path), safe_open(path, framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        tensors = {name: {"dtype": s.get_dtype(), "shape": list(s.get_shape())} for name, s in slices.items()}
        metadata = dict(file.metadata() or {})
    if "dtype_info" in metadata:
        try:
            metadata["dtype_info"] = json.loads(metadata["dtype_info"])
        except ValueError:
            pass  # shown as it stands: inspecting a damaged file is what this is for
    return tensors, metadata


def _checkpoint(path: Path) -> dict[str, Any]:
    index = read_json(path / INDEX)
    components = {}
    for name in sorted(k for k, v in index.items() if isinstance(v, list) and v[-1] is not None):
        folder = path / name
        entry: dict[str, Any] = {"class": index[name][-1]}
        if not folder.is_dir():
            entry["missing"] = True
        elif list(folder.glob("*.safetensors*")):
            headers = [_header(file)[0] for file in weight_files(folder)]
            tensors = {k: v for header in headers for k, v in header.items()}
            entry |= {
                "files": len(headers),
                "tensors": len(tensors),
                "parameters": sum(_size(t["shape"]) for t in tensors.values()),
                "dtypes": sorted({t["dtype"] for t in tensors.values()}),
            }
        components[name] = entry
    return {"kind": "checkpoint", "path": str(path), "pipeline": index.get("_class_name"), "components": components}


def _size(shape: list[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def render(about: dict[str, Any]) -> str:
    """`describe`'s result for people."""
    lines = [f"{about['path']}: {about['kind']}"]
    if about["kind"] == "checkpoint":
        lines[0] += f" of {about['pipeline']}"
        for name, entry in about["components"].items():
            detail = "MISSING" if entry.get("missing") else "no weights"
            if "tensors" in entry:
                detail = f"{entry['parameters']:,} parameters in {entry['tensors']} tensors, {entry['files']} file(s), {', '.join(entry['dtypes'])}"
            lines.append(f"  {name:<14} {entry['class']}: {detail}")
    for name, tensor in about.get("tensors", {}).items():
        lines.append(f"  {name:<28} {tensor['dtype']:<5} {tensor['shape']}")
    for key, value in (about.get("metadata") or about.get("settings") or {}).items():
        lines.append(f"  {key} = {value}")
    for file in about.get("files", []):
        lines += ["", render(file)]
    return "\n".join(lines)
