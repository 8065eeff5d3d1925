"""Savepoints of a denoising run: files from which the same run goes on, bit for bit.

    denoising-<key>-<step>.safetensors    "state" [K, B, …], "generators" [B, n]; two of a run are kept

The key tells one run from another: all settings, the weights, the embeddings. Imports neither jax nor torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpuvid.contract.digests import digest_of
from tpuvid.contract.loop import LoopState
from tpuvid.errors import InputError
from tpuvid.files.stage_files import read_stage_file, write_tensors

KEPT = 2
"""A damaged one is refused, and the one before is used."""


@dataclass(frozen=True, slots=True)
class Savepoints:
    """The savepoints of one run, in `folder`."""

    folder: Path
    run: Mapping[str, Any]
    """All that decides what is computed, JSON-ready."""

    @property
    def key(self) -> str:
        return digest_of(self.run)[:16]

    def files(self) -> list[Path]:
        """The files of the savepoints, newest first."""
        return sorted(self.folder.glob(f"denoising-{self.key}-*.safetensors"), reverse=True)

    def save(self, state: LoopState) -> Path:
        path = self.folder / f"denoising-{self.key}-{state.step:05d}.safetensors"
        tensors = {"state": state.state, "generators": state.generators}
        write_tensors(path, tensors, {"run": self.key, "step": state.step, **self._named()}, overwrite=True)
        older = [other for other in self.files() if other.name <= path.name]  # later ones are of a run that wasn't gone on with
        for other in older[KEPT:]:
            other.unlink(missing_ok=True)
        return path

    def _named(self) -> dict[str, Any]:
        return {name: self.run[name] for name in ("model_id", "fingerprint") if name in self.run}

    def latest(self, steps: int) -> LoopState | None:
        """The newest that is whole and of this run of so many steps; each that isn't is passed over with a warning."""
        for path in self.files():
            try:
                return self._read(path, steps)
            except InputError as error:
                warnings.warn(f"{error} (savepoint passed over)", stacklevel=2)
        return None

    def _read(self, path: Path, steps: int) -> LoopState:
        file = read_stage_file(path)
        step = file.metadata.get("step", "")
        whole = {"state", "generators"} <= set(file.tensors) and file.checked and step.isdecimal() and 0 < int(step) < steps
        if not whole or file.metadata.get("run") != self.key:
            raise InputError(f"{path}: is no savepoint of this run; remove it")
        return LoopState(int(step), file.tensors["state"], file.tensors["generators"])

    def clear(self) -> None:
        """Remove the savepoints, once the run is done and its result is kept elsewhere."""
        for path in self.files():
            path.unlink(missing_ok=True)
