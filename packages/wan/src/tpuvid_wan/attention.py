"""Wan's attention, for tokens that may be split over devices. Source: `WanAttnProcessor` of diffusers."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from tpuvid.bridge import rotate_heads, token_attention


class SplitTokenAttention:
    """An attention processor: among the video's tokens, or (with `encoder_hidden_states`) from them to the prompt's."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(context)), attn.to_v(context)
        value = self._heads(attn, value)
        if encoder_hidden_states is None:
            tables = (table.squeeze(2).squeeze(0) for table in rotary_emb)  # [1, T, 1, D]
            cosines, sines = tables
            query, key = rotate_heads(query, cosines, sines), rotate_heads(key, cosines, sines)
            (out,) = token_attention(("hidden_states", query, key, value, None))
        else:
            out = F.scaled_dot_product_attention(self._heads(attn, query), self._heads(attn, key), value)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))

    @staticmethod
    def _heads(attn, x: Tensor) -> Tensor:
        return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)
