"""Stage files: what one stage leaves for the next, on any machine, in any later process.

    stage1_embeddings.safetensors   Conditioning.tensors
    stage2_latents.safetensors      key "latents"  [B, C, f, h, w]
    stage3_frames.safetensors       key "frames"   [B, F, H, W, C] in [0, 1]   (--save-frames)
    generation_config.json          the settings so far

Each carries a ``format_version`` and a ``checksum`` of its tensors and metadata. Those of a private run have a
``prompts_sha256`` in the place of ``prompt`` and ``negative_prompt``. Files of earlier tools have neither and are
read too: bfloat16 payloads stored as float32 or natively (metadata key ``dtype_info``), ``frames`` or ``video_length`` for
``num_frames``, and missing keys.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tpuvid.contract.digests import canonical, digest_of, raw_bytes, tensors_digest
from tpuvid.contract.parser import parse_settings
from tpuvid.contract.paths import path_of
from tpuvid.contract.settings import EMBEDDED, PRIVATE, GenerationConfig
from tpuvid.contract.values import Conditioning, History, Latents
from tpuvid.errors import InputError
from tpuvid.files.atomic import atomic_path, write_json
from tpuvid.files.digests import check_seal, sealed
from tpuvid.files.readers import readable_safetensors

EMBEDDINGS = "stage1_embeddings.safetensors"
LATENTS = "stage2_latents.safetensors"
FRAMES = "stage3_frames.safetensors"
CONFIG = "generation_config.json"
Result = TypeVar("Result", Conditioning, Latents)
PROMPTS_HASH = "prompts_sha256"
"""What the files of a private run say in the place of settings that are private."""
FORMAT_VERSION = 2
"""1: without ``format_version`` and ``checksum``, as tpuvid 0.1 and earlier tools write."""


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any], *, overwrite: bool) -> None:
    """Write a stage file. bfloat16 is stored natively; metadata values become strings, as safetensors wants."""
    from safetensors.numpy import save

    strings = _strings(metadata, {name: value.dtype for name, value in tensors.items()})
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    payload = save(tensors, strings | {"checksum": _checksum(strings, tensors_digest(tensors))})
    with atomic_path(path, overwrite=overwrite) as temporary:
        temporary.write_bytes(payload)


def _strings(metadata: Mapping[str, Any], dtypes: Mapping[str, np.dtype]) -> dict[str, str]:
    """What stands in a stage file's header, but for the checksum."""
    info = json.dumps({name: f"torch.{dtype.name}" for name, dtype in dtypes.items()})
    own = {"dtype_info": info, "format_version": str(FORMAT_VERSION)}
    return {key: str(value) for key, value in metadata.items() if value is not None} | own


def _checksum(metadata: Mapping[str, str], tensors: str) -> str:
    """SHA-256 of all that a stage file says: its metadata but for the checksum itself, and the digest of its tensors."""
    return digest_of([{key: value for key, value in metadata.items() if key != "checksum"}, tensors])


def _check_content(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bool:
    """Raise `InputError` for a damaged file and for one of a later format; whether the file says enough to be sure."""
    version = metadata.get("format_version")
    if version is None and "checksum" not in metadata:
        return False
    if version is not None and version.isdecimal() and int(version) > FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {version} is newer than {FORMAT_VERSION}, which this tpuvid reads; upgrade it"
        )
    if version != str(FORMAT_VERSION) or metadata.get("checksum") != _checksum(metadata, tensors_digest(tensors)):
        raise InputError(f"{path}: is damaged (its checksum is another); make or fetch it again")
    return True


@dataclass(frozen=True, slots=True)
class StageFile:
    """The tensors of one stage file and its settings, under today's names."""

    path: Path
    tensors: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]
    checked: bool
    """Whether a checksum says that nothing has changed since the file was made."""
    settings: Mapping[str, Any]
    model_id: str | None
    fingerprint: str | None
    history: History

    def result(self) -> dict[str, Any]:
        """The fields of `StageResult`. Those of a run that was private are left to whoever knows the prompts."""
        return {
            "model_id": self.model_id or "", "tensors": self.tensors, "history": self.history, "fingerprint": self.fingerprint
        }  # fmt: skip

    @property
    def prompts_sha256(self) -> str | None:
        return self.metadata.get(PROMPTS_HASH)


def read_stage_file(path: Path) -> StageFile:
    """Read a stage file of this or an earlier tool; raises `InputError` if it is missing, truncated, damaged or foreign."""
    from safetensors import safe_open

    path = path_of(path)
    with readable_safetensors(path), safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    checked = _check_content(path, tensors, metadata)
    stored = _parse_object(path, "dtype_info", metadata)
    tensors = {name: _restore_dtype(value, stored.get(name)) for name, value in tensors.items()}
    return StageFile(
        path=path,
        tensors=tensors,
        metadata=metadata,
        checked=checked,
        settings=parse_settings(metadata, path),
        model_id=metadata.get("model_id"),
        fingerprint=metadata.get("fingerprint"),
        history=_parse_object(path, "history", metadata),
    )


def _parse_object(path: Path, key: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The JSON object in one metadata value; empty where there is none."""
    text = metadata.get(key, "{}")
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict) or (key == "history" and not all(isinstance(v, dict) for v in value.values())):
        raise InputError(f"{path}: metadata {key}={text!r} is no JSON object of the right form; make the file again")
    return value


def _restore_dtype(value: np.ndarray, stored: str | None) -> np.ndarray:
    """Older tools store bfloat16 as float32 and record "bfloat16"; the values are exact, so this is a plain cast."""
    if stored in ("bfloat16", "torch.bfloat16") and value.dtype == np.float32:
        import ml_dtypes

        return value.astype(ml_dtypes.bfloat16)
    return value


def read_config(path: Path) -> dict[str, Any]:
    """The settings and model id of a generation_config.json; empty where there is none."""
    if not path.exists():
        return {}
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is no readable JSON ({error}); remove it or make it again") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: holds a {type(raw).__name__}, not a JSON object; remove it or make it again")
    if "checksum" in raw or "format_version" in raw:
        check_seal(path, raw, "remove it or make it again")
    model = {"model_id": str(raw["model_id"])} if raw.get("model_id") else {}
    return parse_settings(raw, path) | model


def prompts_hash(asked: Conditioning | GenerationConfig) -> str:
    return digest_of([asked.prompt, asked.negative_prompt])


def private(result: Result) -> Result:
    """`result`, of whose prompts its files say nothing but a hash."""
    if result.prompts_sha256:
        return result
    return replace(result, prompts_sha256=prompts_hash(result if isinstance(result, Conditioning) else result.config))


def said_in_files(result: Conditioning | Latents) -> dict[str, Any]:
    """The settings and the model of `result`, as all its files may say them."""
    if isinstance(result, Conditioning):
        about: dict[str, Any] = {name: getattr(result, name) for name in EMBEDDED}
    else:
        about = result.config.to_dict()
    if result.prompts_sha256:
        about = {name: value for name, value in about.items() if name not in PRIVATE} | {PROMPTS_HASH: result.prompts_sha256}
    return about | {"model_id": result.model_id}


def save_conditioning(folder: Path, conditioning: Conditioning, *, overwrite: bool) -> Path:
    path = folder / EMBEDDINGS
    about = said_in_files(conditioning) | {"fingerprint": conditioning.fingerprint}
    write_tensors(path, conditioning.tensors, about | _history(conditioning), overwrite=overwrite)
    write_json(folder / CONFIG, sealed(about | {"format_version": FORMAT_VERSION}), overwrite=True)
    return path


def _history(result: Conditioning | Latents) -> dict[str, str]:
    return {"history": json.dumps(result.history, ensure_ascii=False)}


def check_config(folder: Path, *, overwrite: bool) -> None:
    """Raise `InputError` if the folder's generation_config.json is not one that a stage wrote: it would be replaced."""
    path = folder / CONFIG
    if path.is_dir() or (path.exists() and not overwrite and "model_id" not in read_config(path)):
        raise InputError(f"{path}: exists and is not a stage's settings; choose another --output-dir or pass --overwrite")


def load_conditioning(path: Path) -> Conditioning:
    """Raises `InputError` if `path` holds no prompt embeddings."""
    file = read_stage_file(path)
    if "prompt_embeds" not in file.tensors:
        raise InputError(f"{path}: holds {_names(file)}, not prompt_embeds; run tpuvid encode first")
    settings = {name: file.settings.get(name, "" if name in PRIVATE else None) for name in EMBEDDED}
    return Conditioning(**file.result(), **settings, prompts_sha256=file.prompts_sha256)


def read_conditioning(path: Path, config: GenerationConfig) -> Conditioning:
    """The embeddings of a stage file that `config` is known to have made; raises `InputError` for those of another prompt."""
    found = load_conditioning(path)
    if found.prompts_sha256 is None:
        return found
    if found.prompts_sha256 != prompts_hash(config):
        raise InputError(f"{path}: holds the embeddings of another prompt")
    return replace(found, prompt=config.prompt, negative_prompt=config.negative_prompt, prompts_sha256=None)


def save_latents(folder: Path, latents: Latents, *, overwrite: bool) -> Path:
    path = folder / LATENTS
    about = said_in_files(latents) | {"fingerprint": latents.fingerprint}
    write_tensors(path, latents.tensors, about | _history(latents), overwrite=overwrite)
    write_json(folder / CONFIG, sealed(about | {"format_version": FORMAT_VERSION}), overwrite=True)
    return path


def load_latents(path: Path) -> StageFile:
    """The file, whose "latents" are [B, C, f, h, w]; raises `InputError` if `path` holds none."""
    file = read_stage_file(path)
    latents = file.tensors.get("latents")
    if latents is None:
        raise InputError(f"{path}: holds {_names(file)}, not latents; run tpuvid denoise first")
    if latents.ndim != 5:
        raise InputError(f"{path}: latents have shape {list(latents.shape)}, not [B, C, f, h, w]; run tpuvid denoise again")
    return file


def read_latents(path: Path, config: GenerationConfig) -> Latents:
    """The latents of a stage file that `config` is known to have made; raises `InputError` where it is not whole."""
    file = load_latents(path)
    if not file.checked:
        raise InputError(f"{path}: has no checksum")
    return Latents(**file.result(), config=config)


def save_frames(folder: Path, frames: np.ndarray, settings: Mapping[str, Any], *, overwrite: bool) -> Path:
    path = folder / FRAMES
    with atomic_path(path, overwrite=overwrite) as temporary, FramesWriter(temporary, settings) as writer:
        writer.write(frames)
    return path


class FramesWriter:
    """A frames file at `path`, written chunk by chunk: none is held. Its header is filled in at the end."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]):
        self.path, self.shape, self._digest = path, (0, 0, 0, 0, 0), hashlib.sha256()
        self._metadata = _strings(metadata, {"frames": np.dtype(np.float32)})

    def __enter__(self) -> FramesWriter:
        self._room = len(self._header([2**40] * 5, "0" * 64)) // 8 * 8 + 8
        self._file = self.path.open("wb")
        self._file.write(bytes(8 + self._room))
        return self

    def write(self, frames: np.ndarray) -> None:
        """Write the next frames: [1, n, H, W, C], float32 in [0, 1]."""
        batch, count, *size = frames.shape
        self.shape = batch, self.shape[1] + count, *size
        data = raw_bytes(frames.astype(np.float32, copy=False))
        self._digest.update(data)
        self._file.write(data)

    def __exit__(self, kind: type | None, *_: object) -> None:
        with self._file:
            if kind is None:
                self._digest.update(canonical(["frames", "float32", self.shape]))
                header = self._header(self.shape, _checksum(self._metadata, self._digest.hexdigest()))
                self._file.seek(0)
                self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))

    def _header(self, shape: Sequence[int], checksum: str) -> bytes:
        """The header as safetensors has it: the place of each tensor, and metadata."""
        tensor = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, 4 * math.prod(shape)]}
        return json.dumps({"__metadata__": self._metadata | {"checksum": checksum}, "frames": tensor}).encode()


def _names(file: StageFile) -> str:
    names = ", ".join(sorted(file.tensors)[:3])
    return f"the tensors {names}" if names else "no tensors"
