"""The tensors of one component, read piece by piece from its safetensors files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tpuvid.errors import InputError
from tpuvid.files.readers import read_json, readable_safetensors


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one component, by its index where it has one; raises `InputError` if any is missing."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        weight_map = read_json(indexes[0]).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(f"{indexes[0]}: has no weight_map; download the checkpoint again")
        names = {str(name) for name in weight_map.values()}
        if any(os.path.basename(name) != name or name in ("", ".", "..") for name in names):
            raise InputError(f"{indexes[0]}: names files outside its folder; download the checkpoint again")
        shards = [folder / name for name in sorted(names)]
    else:
        variants = ("model.safetensors", "diffusion_pytorch_model.safetensors")
        shards = [folder / name for name in variants if (folder / name).exists()][:1] or sorted(folder.glob("*.safetensors"))
    if missing := [shard.name for shard in shards if not shard.exists()]:
        raise InputError(f"{folder}: {len(missing)} of {len(shards)} shards are missing ({missing[0]}); download it again")
    if not shards:
        other = next((p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"}), None)
        remedy = (
            f"{other} is a pickle and is not read; convert it with save_pretrained(safe_serialization=True)"
            if other
            else "download it again"
        )
        raise InputError(f"{folder}: holds no .safetensors weights; {remedy}")
    return shards


class Weights(Mapping[str, tuple[int, ...]]):
    """The tensors of one component: a mapping of name → shape, with values read piece by piece from memory-mapped files."""

    def __init__(self, shards: list[Path]):
        from safetensors import safe_open

        self.folder = shards[0].parent
        self._slices: dict[str, Any] = {}
        for shard in shards:
            with readable_safetensors(shard):
                handle = safe_open(shard, framework="numpy")
                slices = {name: handle.get_slice(name) for name in handle.keys()}
            if twice := sorted(self._slices.keys() & slices):
                raise InputError(f"{shard}: holds {twice[0]}, as another shard does; download the checkpoint again")
            self._slices |= slices

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[name].get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def __len__(self) -> int:
        return len(self._slices)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The part `index` of one tensor (all of it by default); only that part enters memory."""
        return self._slices[name][index or ...]


class UnseenWeights(Weights):
    """Weights of which nothing is known but that they will fit; in the place of loading them, `place` is called for each."""

    def __init__(self, place: Callable[[Any, Any], Any]):
        self._slices = {}
        self.place = place
