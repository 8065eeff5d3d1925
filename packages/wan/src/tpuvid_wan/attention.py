"""Wan's attention, for tokens that may be split over devices. Source: `WanAttnProcessor` of diffusers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from tpuvid.bridge import token_attention


class SplitTokenAttention:
    """An attention processor: among the video's tokens, or (with `encoder_hidden_states`) from them to the prompt's."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(context)), attn.to_v(context)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        if rotary_emb is not None:
            query, key = (rotate(x, *rotary_emb) for x in (query, key))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if encoder_hidden_states is None:
            (out,) = token_attention(("hidden_states", query, key, value, None))
        else:
            out = F.scaled_dot_product_attention(query, key, value)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Pairs of neighbouring channels of [B, T, N, D] by the angles of tables [1, T, 1, D], in float32."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (x.float() * cosines + turned.float() * sines).to(x.dtype)
