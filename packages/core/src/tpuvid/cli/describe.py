"""What an mp4, a stage file, a folder of them, a pack or a checkpoint holds. Imports neither jax nor torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tpuvid.cli.video_story import story
from tpuvid.compute.packs.pack import HEADER, read_pack
from tpuvid.compute.run_key import key_hash
from tpuvid.errors import InputError, TpuvidError
from tpuvid.files.checkpoint import INDEX
from tpuvid.files.mp4 import is_cut_short, video_size
from tpuvid.files.readers import read_json, readable_safetensors
from tpuvid.files.stage_files import CONFIG, read_stage_file
from tpuvid.files.weights import weight_files
from tpuvid.runs.kept.record import read_record


def describe(path: Path) -> dict[str, Any]:
    """An mp4, a safetensors file (a pack among them), a diffusers checkpoint folder or one of stage files, as JSON-ready data.

    Raises `InputError` for anything else.
    """
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        raise InputError(
            f"{path}: {'is neither a file nor a folder' if path.exists() else 'does not exist'}; give a file or a folder"
        )
    if (path / INDEX).exists():
        return _checkpoint(path)
    if (path / "config.json").exists():
        return {"kind": "component", "path": str(path), **_component(path)}
    files = sorted(path.glob("*.safetensors"))
    if not files and not (path / CONFIG).exists():
        raise InputError(
            f"{path}: holds neither a {INDEX} nor safetensors files; give a stage file, a stage folder or a checkpoint"
        )
    return {
        "kind": "folder",
        "path": str(path),
        "settings": read_json(path / CONFIG) if (path / CONFIG).exists() else {},
        "files": [_file(f) for f in files],
    }


def _file(path: Path) -> dict[str, Any]:
    if path.suffix == ".mp4":
        return _video(path)
    if path.suffix == ".json":
        return {"kind": "settings", "path": str(path), "settings": read_json(path)}
    tensors, metadata = _header(path)
    if HEADER in metadata:
        return _pack(path)
    return {
        "kind": "safetensors",
        "path": str(path),
        "tensors": tensors,
        "metadata": metadata,
        "content": _content(path, metadata),
    }


def _content(path: Path, metadata: Mapping[str, Any]) -> str:
    """What a stage file's checksum says."""
    if "checksum" not in metadata and "format_version" not in metadata:
        return "not checked: an earlier tool's file, or no stage file"
    try:
        read_stage_file(path)
    except InputError as error:
        return f"not as it was made: {error}"
    return "as it was made (checksum)"


def _video(path: Path) -> dict[str, Any]:
    if is_cut_short(path):
        raise TpuvidError(f"{path}: is truncated: it ends before the video does; copy or fetch it again, or make it again")
    about = {"kind": "video", "path": str(path), **video_size(path)}
    try:
        return about | {"settings": read_record(path)}
    except InputError as error:
        return about | {"settings": {}, "error": str(error)}


def _pack(path: Path) -> dict[str, Any]:
    pack = read_pack(path)
    programs = [asdict(program) for program in pack.programs]
    return {"kind": "pack", "path": str(path), "made_by": pack.made_by, "hash": key_hash(pack.key), "key": dict(pack.key),
            "programs": programs}  # fmt: skip


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
    for name in sorted(k for k, v in index.items() if isinstance(v, list) and v and v[-1] is not None):
        folder = path / name
        entry: dict[str, Any] = {"class": index[name][-1]}
        try:
            entry |= _component(folder)
        except InputError as error:  # the others are still worth a look
            entry["error"] = str(error)
        components[name] = entry
    return {"kind": "checkpoint", "path": str(path), "pipeline": index.get("_class_name"), "components": components}


def _component(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(f"{folder}: is missing")
    configs = [
        folder / name for name in ("config.json", "scheduler_config.json", "guider_config.json") if (folder / name).exists()
    ]
    entry: dict[str, Any] = {"settings": read_json(configs[0]) if configs else {}}
    if list(folder.glob("*.safetensors*")):
        files = weight_files(folder)
        tensors = {name: tensor for file in files for name, tensor in _header(file)[0].items()}
        entry |= {"files": len(files), "parameters": sum(_size(t["shape"]) for t in tensors.values()), "tensors": tensors}
    return entry


def _size(shape: list[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _grouped(tensors: dict[str, dict]) -> list[str]:
    """A line for all tensors that differ only in numbers in their names and are alike in dtype and shape."""
    groups: dict[tuple, list[str]] = {}
    for name, tensor in tensors.items():
        key = (re.sub(r"(?<=\.)\d+(?=\.)", "*", name, count=1), tensor["dtype"], tuple(tensor["shape"]))
        groups.setdefault(key, []).append(name)
    return [
        f"{pattern if len(names) > 1 else names[0]:<60} {dtype:<5} {list(shape)}{f' ×{len(names)}' if len(names) > 1 else ''}"
        for (pattern, dtype, shape), names in groups.items()
    ]


def _listed(key: str, value: Any, indent: str = "  ") -> list[str]:
    """A setting; what is nested goes below its name."""
    if not (isinstance(value, dict) and value):
        return [f"{indent}{key} = {value}"]
    return [f"{indent}{key}", *(line for k, v in value.items() for line in _listed(k, v, indent + "  "))]


def render(about: dict[str, Any], *, all_of_it: bool = False) -> str:
    """`describe`'s result for people; of a video `story` alone, unless `all_of_it` is wanted."""
    lines = [f"{about['path']}: {about['kind']}"]
    if about["kind"] == "checkpoint":
        lines[0] += f" of {about['pipeline']}"
        for name, entry in about["components"].items():
            detail = entry.get("error", "no weights")
            if "tensors" in entry:
                detail = f"{entry['parameters']:,} parameters in {len(entry['tensors'])} tensors, {entry['files']} file(s)"
            lines.append(f"  {name}: {entry['class']}: {detail}")
            settings = {k: v for k, v in entry.get("settings", {}).items() if not k.startswith("_")}
            lines += [f"      {key} = {value}" for key, value in settings.items()]
            lines += [f"      {line}" for line in _grouped(entry.get("tensors", {}))]
    if about["kind"] == "pack":
        lines[0] += f" of {about['key'].get('family')}, made by {about['made_by']}, key {about['hash']}"
        for program in about["programs"]:
            lines.append(f"  {program['stage']}: {program['name']}: {program['bytes'] / 1e6:.1f} MB: {program['arguments']}")
        lines += [f"  {name} = {value}" for name, value in about["key"].items() if name not in ("configs", "device_order")]
    if about["kind"] == "video" and about["settings"] and not all_of_it:
        return "\n".join([f"{about['path']}: video", *(f"  {line}" for line in story(about))])
    if about["kind"] == "video":
        lines[0] += f", {about['width']}x{about['height']}, {about['frames']} frames at {about['fps']:g} per second"
        lines += [f"  {about['error']}"] if "error" in about else []
    lines += [f"  {line}" for line in _grouped(about.get("tensors", {}))]
    lines += [f"  content: {about['content']}"] if "content" in about else []
    for key, value in (about.get("metadata") or about.get("settings") or {}).items():
        lines += _listed(key, value)
    for file in about.get("files", []):
        lines += ["", render(file, all_of_it=all_of_it)]
    return "\n".join(lines)
