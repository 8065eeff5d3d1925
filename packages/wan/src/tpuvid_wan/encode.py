"""Stage 1 of Wan: a prompt through UMT5. Source: `WanPipeline._get_t5_prompt_embeds` of diffusers."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int
from torch import nn
from tpuvid.family import Checkpoint, Runtime, T5TextEncoder, build, open_tokenizer


def clean_prompt(text: str) -> str:
    """Mend mis-encoded text, undo HTML escapes (twice, as the reference does) and collapse whitespace."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def _build(folder: Path) -> nn.Module:
    from transformers import AutoConfig, UMT5EncoderModel  # seconds, and needed only when something has to be traced

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return build(lambda: UMT5EncoderModel(config))


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


class WanTextEncoder(T5TextEncoder):
    def __init__(self, checkpoint: Checkpoint, runtime: Runtime):
        tokenizer = open_tokenizer(checkpoint.component("tokenizer"), runtime.kept.outlines, _tokenizer)
        super().__init__(checkpoint, runtime, module=lambda: _build(checkpoint.component("text_encoder")), tokenizer=tokenizer)

    def prepare(self, prompt: str) -> str:
        return clean_prompt(prompt)

    def embed(self, params, input_ids: Int[Array, "B L"], attention_mask: Int[Array, "B L"]) -> Float[Array, "B L E"]:
        forward = self.traced.function("forward", return_dict=False)
        hidden = forward(params, input_ids=input_ids, attention_mask=attention_mask)[0]
        # where, not a product: whatever the encoder left on padding becomes exactly zero
        return jnp.where(attention_mask[..., None] > 0, hidden, 0)
