"""What is kept with a video about how it was made: in the mp4's metadata and in a JSON file beside it. Imports neither jax
nor torch.

Flat, JSON-ready: ``model_id``, every setting of `GenerationConfig`, and

    checkpoint, revision, fingerprint, loras    the weights: where they were, commit of the Hub, hash
    others       the hashes of components that are not the checkpoint's own: another decoder
    options      those of `tpuvid.contract.options` that decide what is computed
    versions     of Python and of the packages that compute
    history      by stage: devices and layout, step cache, seconds
    latents_sha256, frames_sha256    of float32 [1, C, f, h, w], and of uint8 [F, H, W, 3] before they are compressed
    request      a hash of all that was asked for
    created      when, in UTC
    record_version, checksum         of all this
    video_sha256                     of the mp4: in the JSON file alone
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpuvid.contract.settings import PRIVATE
from tpuvid.errors import InputError
from tpuvid.files.digests import check_seal, file_sha256, sealed
from tpuvid.files.versions import versions
from tpuvid.plugin.registry import registry

if TYPE_CHECKING:
    from tpuvid.contract.settings import GenerationConfig
    from tpuvid.contract.values import History, Latents
    from tpuvid.runs.pipeline import Pipeline

RECORD_VERSION = 1


def make_record(
    pipe: Pipeline,
    latents: Latents,
    config: GenerationConfig,
    history: History,
    *,
    frames_sha256: str,
    request: str | None,
    with_prompt: bool,
) -> dict[str, Any]:
    """The record of a video decoded from `latents`; `with_prompt` False leaves out what is private."""
    settings = {name: value for name, value in config.to_dict().items() if with_prompt or name not in PRIVATE}
    denoised = history.get("denoise", {})
    record = {
        "model_id": latents.model_id,
        **settings,
        "checkpoint": denoised.get("checkpoint", pipe.checkpoint.source),
        "revision": denoised.get("revision"),
        "fingerprint": latents.fingerprint,
        "loras": denoised.get("loras", []),
        "others": pipe.checkpoint.others_record(),
        "options": pipe.runtime.asked().recorded(),
        "versions": versions(*registry().packages_of(pipe.spec)),
        "history": history,
        "latents_sha256": latents.sha256(),
        "frames_sha256": frames_sha256,
        "request": request,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "record_version": RECORD_VERSION,
    }
    return sealed(record)


def read_record(path: Path) -> dict[str, Any]:
    """The record in an mp4, or in the .json beside it; `path` may be either.

    Raises `InputError` where there is none, and where it is damaged.
    """
    from tpuvid.files.mp4 import read_metadata
    from tpuvid.files.readers import read_json

    remedy = "take the .mp4 or the .json beside it, or fetch it again"
    if not path.is_file():
        raise InputError(f"{path}: is no file; give an .mp4 that tpuvid made, or the .json beside it")
    record = read_json(path, remedy) if path.suffix == ".json" else read_metadata(path)
    beside = path.with_suffix(".json")
    if record is None and beside.is_file():
        record = read_json(beside, remedy)
        if record.get("video_sha256") != file_sha256(path):
            raise InputError(f"{path}: holds no record of how it was made, and {beside.name} is another video's")
        path = beside
    if record is None or "record_version" not in record:
        raise InputError(f"{path}: holds no record of how it was made (another tool's, or --no-metadata)")
    if record["record_version"] != RECORD_VERSION:
        raise InputError(
            f"{path}: its record is of version {record['record_version']!r}, this tpuvid reads {RECORD_VERSION}; upgrade it"
        )
    check_seal(path, record, remedy)
    return record


def is_written_as(video: Path, request: str) -> bool:
    """Whether `video` stands there as it was written for `request`, by the file beside it."""
    try:
        record = read_record(video.with_suffix(".json"))
        return record.get("request") == request and record.get("video_sha256") == file_sha256(video)
    except (InputError, OSError):
        return False


def printable(text: str) -> str:
    """What a stranger's file says, for a terminal: control characters are replaced."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
