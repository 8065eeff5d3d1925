"""CogVideoX's attention, for tokens that may be split over devices. Source: `CogVideoXAttnProcessor2_0` of diffusers."""

from __future__ import annotations

from torch import Tensor
from tpuvid.family import rotate_heads, token_attention


class SplitTokenAttention:
    """An attention processor: the prompt's tokens and the video's attend to each other, and stay two arrays."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        video = self._stream(attn, "hidden_states", hidden_states, image_rotary_emb)
        text = self._stream(attn, "encoder_hidden_states", encoder_hidden_states)
        out = token_attention(text, video)
        text, video = (attn.to_out[0](x.transpose(1, 2).flatten(2)) for x in out)
        return video, text

    @staticmethod
    def _stream(attn, name: str, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None):
        query, key, value = (to(x).unflatten(2, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if rotary is None:
            query, key = query.transpose(1, 2), key.transpose(1, 2)
        else:
            query, key = (rotate_heads(x.flatten(2), *rotary) for x in (query, key))
        return name, query, key, value.transpose(1, 2), None
