"""Wan's attention, for tokens that may be split over devices. Source: `WanAttnProcessor` of diffusers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from tpuvid.family import rotate_heads, token_attention


class SplitTokenAttention:
    """An attention processor: among the video's tokens, or from them to the prompt's, whose `keys_values` then come as
    `encoder_hidden_states`."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        query = attn.norm_q(attn.to_q(hidden_states))
        if encoder_hidden_states is None:
            cosines, sines = (table.squeeze(2).squeeze(0) for table in rotary_emb)  # [1, T, 1, D]
            query, key = (rotate_heads(x, cosines, sines) for x in (query, attn.norm_k(attn.to_k(hidden_states))))
            (out,) = token_attention(("hidden_states", query, key, heads_first(attn, attn.to_v(hidden_states)), None))
        else:
            key, value = encoder_hidden_states.unbind(1)
            out = F.scaled_dot_product_attention(heads_first(attn, query), key, value)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def keys_values(attn, text: Tensor) -> Tensor:
    """The keys and values of a prompt's tokens [B, L, C] for one block: [B, 2, N, L, D]."""
    return torch.stack([heads_first(attn, x) for x in (attn.norm_k(attn.to_k(text)), attn.to_v(text))], dim=1)


def heads_first(attn, x: Tensor) -> Tensor:
    """[B, T, N·D] → [B, N, T, D]"""
    return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)
