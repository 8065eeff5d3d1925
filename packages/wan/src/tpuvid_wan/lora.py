"""LoRA files for Wan's transformer, in every format that diffusers reads (diffusers', the original's, musubi's)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from tpuvid.errors import InputError
from tpuvid.family import AdaptedWeights, Delta, Lora, LowRank, Offset, Weights

PREFIX = "transformer."


def adapt(weights: Weights, loras: Sequence[Lora]) -> Weights:
    """`weights` with every LoRA merged in as they are read; raises `InputError` for a file that doesn't fit."""
    for lora in loras:
        weights = AdaptedWeights(weights, read_lora(lora), str(lora.path))
    return weights


def read_lora(lora: Lora) -> dict[str, list[Delta]]:
    """The deltas of one file by checkpoint parameter; raises `InputError` if it is no LoRA of a Wan transformer."""
    from diffusers.loaders import WanLoraLoaderMixin  # seconds, and only where there is a LoRA

    state, metadata = WanLoraLoaderMixin.lora_state_dict(str(lora.path), use_safetensors=True, return_lora_metadata=True)
    tensors = {name.removeprefix(PREFIX): _to_numpy(value) for name, value in state.items()}
    deltas: dict[str, list[Delta]] = defaultdict(list)
    for name, value in tensors.items():
        layer, _, part = name.partition(".lora_")
        match part:
            case "A.weight":
                up = tensors.get(f"{layer}.lora_B.weight")
                if up is None:
                    raise InputError(f"{lora.path}: has {name} without its lora_B; the file is incomplete")
                deltas[f"{layer}.weight"].append(
                    LowRank(value, up, lora.scale * _alpha(metadata, layer, len(value)) / len(value))
                )
            case "B.weight":
                pass  # taken with its A
            case "B.bias":
                deltas[f"{layer}.bias"].append(Offset(lora.scale * value))
            case _:
                raise InputError(f"{lora.path}: holds {name}, which is no LoRA of a Wan transformer")
    if not deltas:
        raise InputError(f"{lora.path}: holds no LoRA weights")
    return deltas


def _alpha(metadata: dict | None, layer: str, rank: int) -> float:
    """PEFT's alpha of one layer; files without it mean alpha = rank."""
    settings = {k.removeprefix(PREFIX): v for k, v in (metadata or {}).items()}
    pattern = settings.get("alpha_pattern") or {}
    return float(pattern.get(layer, settings.get("lora_alpha") or rank))


def _to_numpy(value: torch.Tensor) -> np.ndarray:
    return value.float().numpy()
