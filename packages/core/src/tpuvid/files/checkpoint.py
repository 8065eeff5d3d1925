"""A diffusers checkpoint, in a local folder or on the Hub, whose parts are read one at a time."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpuvid.errors import InputError
from tpuvid.files.hub import download
from tpuvid.files.readers import read_json
from tpuvid.files.untrusted import check_code, check_config, check_links
from tpuvid.files.weights import UnseenWeights, Weights, weight_files

if TYPE_CHECKING:
    from tpuvid.files.lora import Lora

INDEX = "model_index.json"
FINGERPRINTED = (".json", ".safetensors", ".model", ".txt", ".jinja")  # configs, weights, tokenizers, chat templates
FINGERPRINT_SAMPLES, FINGERPRINT_BYTES = 256, 64 * 1024  # per file: small files whole, a 10 GB shard in 16 MB
WEIGHTLESS = {
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
    "guider": "guider_config.json",
}
"""Components without weights, and their configs' names."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where one model's weights are. A Hub repository is fetched one component at a time, when it is first asked for."""

    model_id: str
    folder: Path | None = None
    repo_id: str | None = None
    loras: tuple[Lora, ...] = ()
    """The LoRAs to be merged into the diffusion model."""
    others: Mapping[str, Checkpoint] = field(default_factory=dict)
    """Components that another checkpoint has, with that one."""

    def component(self, name: str) -> Path:
        """The folder of component `name` ("vae", "scheduler", …); raises `InputError` where it is missing."""
        if name in self.others:
            return self.others[name].component(name)
        path = self.root(f"{name}/*") / name
        if not path.is_dir():
            raise InputError(f"{path}: the checkpoint has no {name!r} folder; download the checkpoint again")
        return path

    def config(self, component: str, file: str = "config.json") -> dict[str, Any]:
        """One JSON file of a component; of a Hub repository, that file alone is fetched."""
        if component in self.others:
            return self.others[component].config(component, file)
        root = self.root(f"{component}/{file}")
        return read_json(root / component / file)

    def root(self, pattern: str) -> Path:
        """The folder, or that of a Hub repository once what matches `pattern` is in it."""
        if self.folder is not None:
            return self.folder
        assert self.repo_id is not None, "a checkpoint is a folder or a repository"
        return download(self.repo_id, pattern)

    @property
    def source(self) -> str:
        """Where the weights are, for people and for the record."""
        return self.repo_id or str(self.folder)

    def revision(self, component: str) -> str | None:
        """The commit that a Hub repository's component was fetched at; None for a folder."""
        if component in self.others:
            return self.others[component].revision(component)
        if self.repo_id is None:
            return None
        snapshot = self.component(component).parent
        return snapshot.name if snapshot.parent.name == "snapshots" else None

    def fingerprint(self) -> str | None:
        """Tells one local checkpoint from another that has the same shapes, wherever the folder lies.

        A hash of the configs, tokenizers, sizes and samples of all weights; None for a repository, which its id names.
        """
        if self.folder is None:
            return None
        try:
            stats = [(path, path.stat()) for path in sorted(self.folder.glob("*/*")) if path.suffix in FINGERPRINTED]
        except FileNotFoundError as error:  # what was listed is gone
            raise InputError(f"{self.folder}: changes while it is read ({error}); give a folder that stays as it is") from None
        return _fingerprint(self.folder, tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats))

    def others_record(self) -> dict[str, str]:
        """The components that another checkpoint has, each with that checkpoint's fingerprint or repository."""
        return {name: other.fingerprint() or other.source for name, other in self.others.items()}

    def lora_record(self) -> list[dict[str, Any]]:
        """The LoRAs, with a hash of each file."""
        return [{"path": str(lora.path), "scale": lora.scale, "sha256": lora.sha256()} for lora in self.loras]

    def require(self, components: tuple[str, ...]) -> None:
        """Raise `InputError` unless each component is there, with its config (and weights, where it has any)."""
        for name in components:
            path = self.component(name)
            check_links(path.parent, path)
            config = path / WEIGHTLESS.get(name, "config.json")
            if name.startswith("tokenizer"):  # whose numbers may be anything
                check_code(config, read_json(config))
            else:
                check_config(config, read_json(config))
            if name not in WEIGHTLESS:
                weight_files(path)

    def read_ahead(self, components: tuple[str, ...]) -> None:
        """Have the system read these components' weights from the disk into its cache, beside whatever is computed."""
        files = [path for name in components if name not in WEIGHTLESS for path in weight_files(self.component(name))]
        threading.Thread(target=_read_ahead, args=(files,), daemon=True).start()

    def weights(self, component: str) -> Weights:
        return Weights(weight_files(self.component(component)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigsOnly(Checkpoint):
    """A checkpoint of which only the configs and tokenizers are read: for planning, with no weights at hand."""

    place: Callable[[Any, Any], Any]
    """(shape struct, sharding) → what stands for a parameter."""

    def require(self, components: tuple[str, ...]) -> None:
        """Raise `InputError` unless each component's config is there."""
        for name in components:
            self.config(name, WEIGHTLESS.get(name, "config.json"))

    def weights(self, component: str) -> UnseenWeights:
        return UnseenWeights(self.place)


def _read_ahead(files: list[Path]) -> None:
    for path in files:
        with suppress(OSError, AttributeError), path.open("rb") as file:  # some systems have no such call
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


@lru_cache(maxsize=8)
def _fingerprint(folder: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    """The fingerprint of files with their sizes and times of change, by which it is known again without reading."""
    digest = hashlib.sha256()
    for path, size, _ in files:
        digest.update(f"{path.relative_to(folder)} {size} ".encode())
        with path.open("rb") as file:
            for i in range(FINGERPRINT_SAMPLES):
                file.seek(size * i // FINGERPRINT_SAMPLES)
                digest.update(file.read(FINGERPRINT_BYTES))
    return digest.hexdigest()[:32]
