"""LTX-Video's attention, for tokens that may be split over devices. Source: `LTXVideoAttnProcessor` of diffusers."""

from diffusers.models.transformers.transformer_ltx import apply_rotary_emb
from torch.nn import functional as F
from tpuvid.family import token_attention


class SplitTokenAttention:
    """An attention processor: among the video's tokens, or from them to the prompt's under a mask over keys [B, 1, 1, L]."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(text)), attn.to_v(text)
        if image_rotary_emb is not None:  # each head has frequencies of its own, so this comes before heads are split
            query, key = (apply_rotary_emb(x, image_rotary_emb) for x in (query, key))
        query, key, value = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))  # [B, N, T, D]
        if encoder_hidden_states is None:
            (out,) = token_attention(("hidden_states", query, key, value, None))
        else:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))
