"""Wan's transformer, with what it makes of a prompt apart from what it makes of a video.

Keys and values of the prompt are the same in every step, so they are computed once for each video. Source:
`WanTransformer3DModel.forward` of diffusers, which computes them in every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import WanTransformer3DModel
from torch import Tensor
from tpuvid.family import build

from tpuvid_wan.attention import SplitTokenAttention, keys_values


class TextToVideoTransformer(WanTransformer3DModel):
    """Its `forward` takes as `encoder_hidden_states` what `prompt_keys_values` gives; the blocks must be `ScannedBlocks`."""

    def prompt_keys_values(self, text: Tensor) -> Tensor:
        """Embeddings [B, L, E] → [depth, B, 2, N, L, D]."""
        embedder = self.condition_embedder.text_embedder
        text = type(embedder).forward(embedder, text)
        return self.blocks.map(lambda block: keys_values(block.attn2, text))


def build_transformer(
    config: Mapping[str, Any], kind: type[TextToVideoTransformer] = TextToVideoTransformer
) -> TextToVideoTransformer:
    """The module of transformer/config.json."""
    module = build(lambda: kind.from_config(config))
    module.facts = {"keep_in_fp32": tuple(module._keep_in_fp32_modules or ())}
    module.set_attn_processor(SplitTokenAttention())
    module.condition_embedder.text_embedder.forward = lambda keys_values: keys_values  # these are past it
    return module
