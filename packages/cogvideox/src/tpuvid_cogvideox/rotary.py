"""Rotary tables for a grid of patches, in float32 on the host. Source: `_prepare_rotary_positional_embeddings` of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from jaxtyping import Float
from tpuvid.errors import InputError


def rotary_tables(config: Mapping[str, Any], frames: int, height: int, width: int) -> tuple[Float[np.ndarray, "T D"], ...]:
    """Cosines and sines of the T patches of `frames`×`height`×`width` latents; `config` is the transformer's.

    Raises `InputError` for a size beyond the table of a CogVideoX1.5 transformer.
    """
    patch, patch_t = config["patch_size"], config["patch_size_t"]
    grid = height // patch, width // patch
    most = config["sample_height"] // patch, config["sample_width"] // patch
    if patch_t is None:  # CogVideoX 1.0: its training grid, stretched
        crop = get_resize_crop_region_for_grid(grid, most[1], most[0])
        where = dict(crops_coords=crop, temporal_size=frames)
    else:
        for name, size, limit in zip(("height", "width"), grid, most, strict=True):
            if size > limit:
                raise InputError(
                    f"{name}={size * patch * 8}: this checkpoint's rotary table ends at {limit * patch * 8}; "
                    "choose a smaller size"
                )
        where = dict(crops_coords=None, temporal_size=-(-frames // patch_t), grid_type="slice", max_size=most)
    tables = get_3d_rotary_pos_embed(embed_dim=config["attention_head_dim"], grid_size=grid, **where)
    return tuple(table.float().numpy() for table in tables)
