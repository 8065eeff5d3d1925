"""Whether a stage's inputs fit the model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tpuvid.errors import InputError


def check_embeds(tensors: Mapping[str, np.ndarray], width: int) -> None:
    """Raise `InputError` unless the prompts' embeddings are alike, [1, L, width] and floating point."""
    length = tensors["prompt_embeds"].shape[1:2]
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        embeds = tensors.get(name)
        if embeds is None:
            continue
        if embeds.shape != (1, *length, width) or 0 in embeds.shape or embeds.dtype.kind in "biu":
            raise InputError(
                f"{name} is {embeds.dtype} {list(embeds.shape)}, this model takes [1, L, {width}], both alike; "
                "encode with this model"
            )
        check_finite_embeds(name, embeds)


def check_finite_embeds(name: str, embeds: np.ndarray) -> None:
    """Raise `InputError` where the conditioning `name` holds NaN or infinity."""
    if not np.isfinite(embeds.astype(np.float32)).all():
        raise InputError(f"{name} holds NaN or infinity; encode again")


def check_latents(latents: np.ndarray, channels: int) -> None:
    """Raise `InputError` unless latents are [B, channels, f, h, w]."""
    if latents.ndim != 5 or latents.shape[1] != channels:
        raise InputError(
            f"latents have shape {list(latents.shape)}, this model takes [B, {channels}, f, h, w]; denoise with this model"
        )
