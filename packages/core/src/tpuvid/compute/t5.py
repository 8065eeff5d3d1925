"""Text encoders of the T5 family (T5, UMT5): their parameters on a mesh, and a prompt through one of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from jax import Array
from jaxtyping import Float, Int
from torch import nn

from tpuvid.compute.bridge import Params
from tpuvid.compute.runtime import Runtime
from tpuvid.compute.text_encoder import Encoder, check_vocabulary
from tpuvid.contract.settings import GenerationConfig
from tpuvid.files.checkpoint import Checkpoint

T5_RULES = (
    (r"shared\.weight", ("tp", None)),
    (r".*\.SelfAttention\.[qkv]\.weight", ("tp", None)),
    (r".*\.SelfAttention\.o\.weight", (None, "tp")),
    (r".*\.DenseReluDense\.wi_[01]\.weight", ("tp", None)),
    (r".*\.DenseReluDense\.wo\.weight", (None, "tp")),
)
"""Megatron-style tensor parallelism. Torch weights are [out, in]; the embedding is [words, width]."""


class T5TextEncoder(Encoder, ABC):
    """A `TextEncoder` over an encoder of transformers; a family says in `embed` what it does with padding."""

    def __init__(
        self, checkpoint: Checkpoint, runtime: Runtime, *, module: nn.Module | Callable[[], nn.Module], tokenizer: Any
    ):
        super().__init__(checkpoint, runtime, module, heads=("num_heads",), rules=T5_RULES)
        self.tokenizer = tokenizer

    def verify(self) -> None:
        check_vocabulary("tokenizer", self.tokenizer, self)
        super().verify()

    def prepare(self, prompt: str) -> str:
        """What the tokenizer gets for `prompt`: the prompt itself, unless a family cleans it."""
        return prompt

    @abstractmethod
    def embed(self, params: Params, input_ids: Int[Array, "B L"], attention_mask: Int[Array, "B L"]) -> Float[Array, "B L E"]:
        """The embeddings of padded tokens; traced."""

    def encode(self, config: GenerationConfig, *, negative: bool) -> dict[str, np.ndarray]:
        """``prompt_embeds`` [1, L, E] and, if `negative`, ``negative_prompt_embeds``; L is ``max_sequence_length``."""
        prompts = {"prompt_embeds": config.prompt}
        if negative:
            prompts["negative_prompt_embeds"] = config.negative_prompt
        return {name: self._encode(prompt, config.max_sequence_length) for name, prompt in prompts.items()}

    def _encode(self, prompt: str, length: int) -> Float[np.ndarray, "1 L E"]:
        options = dict(padding="max_length", max_length=length, truncation=True, return_tensors="np")
        return self.run(self.embed, self.tokenizer(self.prepare(prompt), **options))
