"""HunyuanVideo's transformer for text alone: the stock modules, called so that everything is static and no mask is square.

Image tokens of a text-to-video run are all masked out, so there are none here. Text tokens carry no positions in the
blocks, so where padding stands doesn't matter: it stays in place under a mask, where the stock model moves it to the end.
Source: `HunyuanVideo15Transformer3DModel.forward` of diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15RotaryPosEmbed
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from tpuvid.errors import InputError
from tpuvid.family import build, rotate_heads, token_attention

IMAGE_HALF = ("image_embedder.",)  # weights for image-to-video

TEXT_TYPE, GLYPH_TYPE = 0, 1  # rows of cond_type_embed


class KeyMaskedAttention:
    """The refiner's attention processor: the prompt's tokens attend to each other under a mask over keys, [B, S].

    Where a query is padding its row is left to be whatever it is, since nothing attends to it.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        query, key, value = (heads_first(attn, to(hidden_states)) for to in (attn.to_q, attn.to_k, attn.to_v))
        mask = attention_mask.bool()[:, None, None]
        return attn.to_out[0](merged(F.scaled_dot_product_attention(query, key, value, attn_mask=mask)))


class SplitTokenAttention:
    """The blocks' attention processor: the video's tokens and the prompt's, these under a mask [B, L], attend to each other.

    Tokens may be split over devices. Source: `HunyuanVideo15AttnProcessor2_0` of diffusers.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb):
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key = (
            rotate_heads(norm(x.unflatten(2, (attn.heads, -1))).flatten(2), *image_rotary_emb)
            for norm, x in ((attn.norm_q, query), (attn.norm_k, key))
        )
        video = "hidden_states", query, key, heads_first(attn, value), None
        to = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
        query, key, value = (heads_first(attn, projection(encoder_hidden_states)) for projection in to)
        text = (
            "encoder_hidden_states", attn.norm_added_q(query), attn.norm_added_k(key), value, attention_mask.bool()
        )  # fmt: skip
        video, text = token_attention(video, text)
        return attn.to_out[0](merged(video)), attn.to_add_out(merged(text))


def heads_first(attn, x: Tensor) -> Tensor:
    """[B, T, N·D] → [B, N, T, D]"""
    return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    """[B, N, T, D] → [B, T, N·D]"""
    return x.transpose(1, 2).flatten(2)


class TextToVideoTransformer(HunyuanVideo15Transformer3DModel):
    def forward(self, latents, timestep, text, text_mask, glyphs, glyph_mask, rotary):
        """Latents [B, C, f, h, w] and the two text streams [B, L, E] under their masks [B, L] → velocity [B, C', f, h, w]."""
        dtype = latents.dtype
        # time's sinusoids in float32, whatever the dtype of the weights
        temb = self.time_embed.timestep_embedder(self.time_embed.time_proj(timestep).to(dtype))
        types = self.cond_type_embed.weight
        text = self.refine(text, text_mask, timestep) + types[TEXT_TYPE]
        glyphs = self.context_embedder_2(glyphs) + types[GLYPH_TYPE]
        context, mask = torch.cat([glyphs, text], dim=1), torch.cat([glyph_mask, text_mask], dim=1)
        hidden = self.x_embedder(latents)
        for block in self.transformer_blocks:
            hidden, context = block(hidden, context, temb, mask, rotary)
        velocity = self.proj_out(self.norm_out(hidden, temb))  # patches are of one latent each
        return velocity.transpose(1, 2).unflatten(2, tuple(latents.shape[2:]))

    def refine(self, text, mask, timestep):
        """`HunyuanVideo15TokenRefiner.forward`, with a mask over keys."""
        refiner = self.context_embedder
        kept = mask[..., None].float()
        pooled = ((text * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)).to(text.dtype)
        temb = refiner.time_text_embed(timestep, pooled)
        text = refiner.proj_in(text)
        for block in refiner.token_refiner.refiner_blocks:
            text = block(text, temb, mask)
        return text


def build_transformer(config: Mapping[str, Any]) -> TextToVideoTransformer:
    """The module of transformer/config.json; raises `InputError` for a transformer that needs more than text."""
    module: Any = build(lambda: TextToVideoTransformer.from_config(config))
    full = module.config
    if full.use_meanflow:
        raise InputError(
            "use_meanflow=True: this transformer takes two timesteps (step-distilled, super-resolution); use one without"
        )
    patch = full.patch_size_t, full.patch_size
    if patch != (1, 1):
        raise InputError(
            f"patch_size_t, patch_size={patch}: tpuvid-hunyuan runs patches of one latent, as HunyuanVideo 1.5 has"
        )
    if full.in_channels != 2 * full.out_channels + 1:
        raise InputError(
            f"in_channels={full.in_channels}: needs {2 * full.out_channels + 1} (latents, condition, mask) for "
            f"out_channels={full.out_channels}; this is another model than HunyuanVideo 1.5"
        )
    del module.image_embedder
    module.set_attn_processor(KeyMaskedAttention())
    for block in module.transformer_blocks:
        block.attn.set_processor(SplitTokenAttention())
    return module


def rotary_tables(
    rope: HunyuanVideo15RotaryPosEmbed, frames: int, height: int, width: int
) -> tuple[Float[np.ndarray, "T D"], ...]:
    """Cosines and sines of the T latents of a grid, in float32 on the host."""
    return tuple(table.float().numpy() for table in rope(torch.empty(()).expand(1, 1, frames, height, width)))
