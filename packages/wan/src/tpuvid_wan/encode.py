"""Stage 1 of Wan: a prompt through UMT5. Source: `WanPipeline._get_t5_prompt_embeds` of diffusers."""

from __future__ import annotations

import html
import re

import ftfy
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int
from tpuvid.bridge import TracedModule, build
from tpuvid.checkpoint import Checkpoint
from tpuvid.mesh import split_sizes
from tpuvid.runtime import Runtime, replicated
from tpuvid.stages import GenerationConfig
from tpuvid.weights import load_parameters, match_parameters
from transformers import AutoConfig, AutoTokenizer, UMT5EncoderModel

from tpuvid_wan.sharding import TEXT_ENCODER


def clean_prompt(text: str) -> str:
    """Mend mis-encoded text, undo HTML escapes (twice, as the reference does) and collapse whitespace."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


class WanTextEncoder:
    def __init__(self, checkpoint: Checkpoint, runtime: Runtime):
        folder = checkpoint.component("text_encoder")
        config = AutoConfig.from_pretrained(folder)
        self.runtime = runtime
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint.component("tokenizer"))
        self.traced = TracedModule(build(lambda: UMT5EncoderModel(config)))
        widths = split_sizes(self.traced.parameters(runtime.dtype), TEXT_ENCODER)
        self.mesh = runtime.encoder_mesh({config.num_heads, *widths})
        self.checkpoint = checkpoint
        self.programs = runtime.programs(self.mesh)

    def verify(self) -> None:
        match_parameters(self.traced, self.checkpoint.weights("text_encoder"))

    def load(self) -> None:
        self.params = load_parameters(
            self.traced, self.checkpoint.weights("text_encoder"), mesh=self.mesh, rules=TEXT_ENCODER, dtype=self.runtime.dtype
        )

    def encode(self, config: GenerationConfig, *, negative: bool) -> dict[str, np.ndarray]:
        """``prompt_embeds`` [1, L, E] and, if `negative`, ``negative_prompt_embeds``; rows past the text are zero."""
        length = config.max_sequence_length
        tensors = {"prompt_embeds": self._embed(config.prompt, length)}
        if negative:
            tensors["negative_prompt_embeds"] = self._embed(config.negative_prompt, length)
        return tensors

    def _embed(self, prompt: str, length: int) -> Float[np.ndarray, "1 L E"]:
        tokens = self.tokenizer(
            clean_prompt(prompt), padding="max_length", max_length=length, truncation=True, return_tensors="np"
        )
        inputs = [
            jax.device_put(tokens[name].astype(np.int32), replicated(self.mesh)) for name in ("input_ids", "attention_mask")
        ]
        run = self.programs.get("text encoder", self._function(), self.params, *inputs)
        with self.runtime.progress.phase("encode"):
            return np.asarray(run(self.params, *inputs))

    def _function(self):
        forward = self.traced.function("forward", return_dict=False)

        def embed(params, input_ids: Int[Array, "B L"], attention_mask: Int[Array, "B L"]) -> Float[Array, "B L E"]:
            hidden = forward(params, input_ids=input_ids, attention_mask=attention_mask)[0]
            # where, not a product: whatever the encoder left on padding becomes exactly zero
            return jnp.where(attention_mask[..., None] > 0, hidden, 0)

        return embed
