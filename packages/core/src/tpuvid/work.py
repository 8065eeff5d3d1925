"""What is kept of videos that are not done yet, beside where they will stand, and which videos of a batch are done.

    <output folder>/.tpuvid/embeddings-<key>/    stage 1
                            latents-<key>/       stage 2
                            denoising-<key>-<step>.safetensors    see `tpuvid.resume`
    <output folder>/batch.json                   of a batch: names, seeds that were drawn, what is done, what failed

The keys say everything that the content depends on. Imports neither jax nor torch.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpuvid.artifacts import (
    EMBEDDINGS,
    LATENTS,
    digest_of,
    load_conditioning,
    read_latents,
    save_conditioning,
    save_latents,
    write_json,
)
from tpuvid.checkpoint import read_json
from tpuvid.errors import InputError
from tpuvid.locks import WORK_FOLDER, remove_if_empty
from tpuvid.record import check_seal, sealed
from tpuvid.stages import Conditioning, GenerationConfig, Latents

BATCH = "batch.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Work:
    """The stage files of videos that are written to `output_dir`, made with `origin`: checkpoint and options."""

    output_dir: Path
    origin: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        return self.output_dir / WORK_FOLDER

    def embeddings(self, config: GenerationConfig) -> Path:
        """The folder of stage 1's file."""
        names = ("prompt", "negative_prompt", "max_sequence_length")
        asked = {name: getattr(config, name) for name in names} | {"guidance": config.do_classifier_free_guidance}
        return self._folder("embeddings", asked)

    def latents(self, config: GenerationConfig) -> Path:
        """The folder of stage 2's file."""
        return self._folder("latents", config.to_dict() | {"fps": None})

    def _folder(self, kind: str, asked: Mapping[str, Any]) -> Path:
        return self.folder / f"{kind}-{digest_of([self.origin, asked])[:16]}"

    def load_embeddings(self, config: GenerationConfig) -> Conditioning | None:
        """None where there are none, or none that are whole."""
        return _whole(load_conditioning, self.embeddings(config) / EMBEDDINGS)

    def load_latents(self, config: GenerationConfig) -> Latents | None:
        """None where there are none, or none that are whole."""
        return _whole(lambda path: read_latents(path, config), self.latents(config) / LATENTS)

    def save_embeddings(self, config: GenerationConfig, conditioning: Conditioning) -> None:
        save_conditioning(self.embeddings(config), conditioning, overwrite=True)

    def save_latents(self, config: GenerationConfig, latents: Latents) -> None:
        save_latents(self.latents(config), latents, overwrite=True)

    def kept(self, config: GenerationConfig) -> bool:
        """Whether anything of this video's denoising is kept."""
        return (self.latents(config) / LATENTS).exists() or any(self.folder.glob("denoising-*"))

    def drop(self, *folders: Path) -> None:
        """What is not needed any more."""
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        remove_if_empty(self.folder)


def _whole(load: Callable[[Path], Any], path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return load(path)
    except InputError as error:
        warnings.warn(f"{error} (made again)", stacklevel=3)
        return None


class Manifest:
    """``batch.json``: by name of the mp4, its key and what became of it."""

    def __init__(self, folder: Path):
        """Raises `InputError` for one that is damaged or no batch's."""
        self.path = folder / BATCH
        self.videos: dict[str, dict[str, Any]] = {}
        self.drawn: dict[str, int] = {}
        """Seeds, by key of the request."""
        self.pages = False
        """Whether the folder's index page and sheet are this batch's."""
        if not self.path.exists():
            return
        value = read_json(self.path)
        if (
            value.get("format") != FORMAT
            or not isinstance(value.get("videos"), dict)
            or not isinstance(value.get("drawn"), dict)
        ):
            raise InputError(f"{self.path}: is not what a batch of this tpuvid writes; choose another --output-dir")
        try:
            check_seal(self.path, value)
        except InputError:
            raise InputError(
                f"{self.path}: is damaged (its checksum is another); remove it, and the videos beside it are made again with --overwrite"
            ) from None
        self.videos, self.drawn, self.pages = value["videos"], value["drawn"], bool(value.get("pages"))

    def seed(self, request: Mapping[str, Any], draw: Callable[[], int]) -> int:
        """The seed that was drawn for this request when it was first made."""
        return self.drawn.setdefault(digest_of(request)[:16], draw())

    def is_done(self, name: str, key: str) -> bool:
        """Whether the video stands there as this batch has written it."""
        entry, path = self.videos.get(name, {}), self.path.parent / name
        return entry.get("key") == key and path.is_file() and "sha256" in entry and file_sha256(path) == entry["sha256"]

    def was_begun(self, name: str, key: str) -> bool:
        """Whether files of this video may stand there without the mp4, which is written last."""
        return self.videos.get(name, {}).get("key") == key and not (self.path.parent / name).exists()

    def note(self, name: str, key: str, **about: Any) -> None:
        """What has become of a video, kept at once."""
        self.videos[name] = {"key": key, **about}
        self.save()

    def save(self) -> None:
        value = {"format": FORMAT, "videos": self.videos, "drawn": self.drawn, "pages": self.pages}
        write_json(self.path, sealed(value), overwrite=True)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
