"""What is kept of videos that are not done yet, beside where they will stand, and which videos of a batch are done.

    <output folder>/.tpuvid/batch/                          of the folder's batches, or
                            video-<key>/                    of a video that is made alone:
                                        embeddings-<key>/   stage 1
                                        latents-<key>/      stage 2
                                        denoising-*         savepoints, see `tpuvid.runs.kept.savepoints`
    <output folder>/batch.json    of batches: names, seeds that were drawn, what is done, what failed

The keys say everything that the content depends on. Imports neither jax nor torch.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpuvid.contract.digests import digest_of
from tpuvid.contract.settings import GenerationConfig
from tpuvid.contract.values import Conditioning, Latents
from tpuvid.errors import InputError
from tpuvid.files.atomic import write_json
from tpuvid.files.digests import check_seal, file_sha256, sealed
from tpuvid.files.locks import WORK_FOLDER, remove_if_empty
from tpuvid.files.readers import read_json
from tpuvid.files.stage_files import (
    EMBEDDINGS,
    LATENTS,
    private,
    read_conditioning,
    read_latents,
    save_conditioning,
    save_latents,
)
from tpuvid.runs.kept.identity import RunIdentity

BATCH, BEGUN = "batch.json", "begun.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Work:
    """The stage files of videos that are written to `output_dir`."""

    output_dir: Path
    name: str
    identity: RunIdentity
    """The run's identity but for the config, which each video has its own of."""
    private: bool = False
    """Whether no file may say the prompts. The names don't depend on it: either kind of run goes on from the other's."""

    @property
    def folder(self) -> Path:
        return self.output_dir / WORK_FOLDER / self.name

    def begin(self, video: Path, seed: int) -> None:
        """Note that `video` is going to be written, and its seed, before any work is done."""
        write_json(self.folder / BEGUN, sealed({"video": video.name, "seed": seed}), overwrite=True)

    def was_begun(self, video: Path) -> bool:
        """Whether files of `video` may stand there without the mp4, which is written last."""
        return not video.exists() and self._begun().get("video") == video.name

    def seed(self) -> int | None:
        """The seed of a video alone which was begun."""
        return self._begun().get("seed")

    def _begun(self) -> dict[str, Any]:
        path = self.folder / BEGUN
        try:
            value = read_json(path)
            check_seal(path, value, "")
        except InputError:
            return {}
        return value

    def embeddings(self, config: GenerationConfig) -> Path:
        """The folder of stage 1's file."""
        return self._folder("embeddings", config)

    def latents(self, config: GenerationConfig) -> Path:
        """The folder of stage 2's file."""
        return self._folder("latents", config)

    def _folder(self, kind: str, config: GenerationConfig) -> Path:
        return self.folder / f"{kind}-{self.identity.key(kind, config)}"

    def load_embeddings(self, config: GenerationConfig) -> Conditioning | None:
        """The embeddings kept for `config`; None where there are none, or none that are whole."""
        return _whole(lambda path: read_conditioning(path, config), self.embeddings(config) / EMBEDDINGS)

    def load_latents(self, config: GenerationConfig) -> Latents | None:
        """The latents kept for `config`; None where there are none, or none that are whole."""
        return _whole(lambda path: read_latents(path, config), self.latents(config) / LATENTS)

    def save_embeddings(self, config: GenerationConfig, conditioning: Conditioning) -> None:
        conditioning = private(conditioning) if self.private else conditioning
        save_conditioning(self.embeddings(config), conditioning, overwrite=True)

    def save_latents(self, config: GenerationConfig, latents: Latents) -> None:
        latents = private(latents) if self.private else latents
        save_latents(self.latents(config), latents, overwrite=True)

    def holds_latents(self) -> bool:
        """Whether anything of a denoising is kept, be it a savepoint."""
        return any(self.folder.glob("denoising-*")) or any(self.folder.glob("latents-*/*.safetensors"))

    def drop(self, *folders: Path) -> None:
        """Remove folders that are not needed any more."""
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        remove_if_empty(self.folder)
        remove_if_empty(self.folder.parent)


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
        remedy = "remove it, and the videos beside it are made again with --overwrite"
        value = read_json(self.path, remedy)
        if (
            value.get("format") != FORMAT
            or not isinstance(value.get("videos"), dict)
            or not isinstance(value.get("drawn"), dict)
        ):
            raise InputError(f"{self.path}: is not what a batch of this tpuvid writes; choose another --output-dir")
        check_seal(self.path, value, remedy)
        self.videos, self.drawn, self.pages = value["videos"], value["drawn"], bool(value.get("pages"))

    def seed(self, request: Sequence[Any], drawn: int) -> int:
        """The seed that was drawn for this request when it was first made: `drawn`, where that is now."""
        return self.drawn.setdefault(digest_of(request)[:16], drawn)

    def names(self) -> dict[str, str]:
        """The names of the videos that are done, by key."""
        return {entry["key"]: name for name, entry in self.videos.items() if "sha256" in entry and "key" in entry}

    def is_done(self, name: str, key: str) -> bool:
        """Whether the video stands there as this batch has written it."""
        entry, path = self.videos.get(name, {}), self.path.parent / name
        return entry.get("key") == key and path.is_file() and "sha256" in entry and file_sha256(path) == entry["sha256"]

    def all_done(self) -> bool:
        """Whether nothing of any batch in this folder is missing or has failed, so that none needs what is kept for it."""
        return all("sha256" in entry for entry in self.videos.values())

    def was_begun(self, name: str, key: str) -> bool:
        """Whether files of this video may stand there without the mp4, which is written last."""
        return self.videos.get(name, {}).get("key") == key and not (self.path.parent / name).exists()

    def begin(self, keys: Mapping[str, str]) -> None:
        """Note the videos to be made, by name, and the seeds that were drawn for them, before any work is done."""
        self.videos |= {name: {"key": key, "state": "missing"} for name, key in keys.items()}
        self.save()

    def note(self, name: str, key: str, **about: Any) -> None:
        """Note what has become of a video, and keep it at once."""
        self.videos[name] = {"key": key, **about}
        self.save()

    def save(self) -> None:
        value = {"format": FORMAT, "videos": self.videos, "drawn": self.drawn, "pages": self.pages}
        write_json(self.path, sealed(value), overwrite=True)
