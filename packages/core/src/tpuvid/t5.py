"""Text encoders of the T5 family (T5, UMT5): their parameters on a mesh, and a prompt through one of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Int
from torch import nn

from tpuvid.bridge import TracedModule
from tpuvid.checkpoint import Checkpoint
from tpuvid.mesh import split_sizes
from tpuvid.runtime import Runtime, replicated
from tpuvid.stages import GenerationConfig
from tpuvid.weights import load_parameters, match_parameters

RULES = (
    (r"shared\.weight", ("tp", None)),
    (r".*\.SelfAttention\.[qkv]\.weight", ("tp", None)),
    (r".*\.SelfAttention\.o\.weight", (None, "tp")),
    (r".*\.DenseReluDense\.wi_[01]\.weight", ("tp", None)),
    (r".*\.DenseReluDense\.wo\.weight", (None, "tp")),
)
"""Megatron-style tensor parallelism. Torch weights are [out, in]; the embedding is [words, width]."""


class T5TextEncoder(ABC):
    """A `tpuvid.stages.TextEncoder` over an encoder module of transformers; a family says in `embed` what it does with padding."""

    def __init__(self, checkpoint: Checkpoint, runtime: Runtime, *, module: nn.Module, tokenizer: Any):
        self.checkpoint, self.runtime, self.tokenizer = checkpoint, runtime, tokenizer
        self.traced = TracedModule(module)
        widths = split_sizes(self.traced.parameters(runtime.dtype), RULES)
        self.mesh = runtime.encoder_mesh({module.config.num_heads, *widths})
        self.programs = runtime.programs(self.mesh)

    def verify(self) -> None:
        match_parameters(self.traced, self.checkpoint.weights("text_encoder"))

    def load(self) -> None:
        weights = self.checkpoint.weights("text_encoder")
        self.params = load_parameters(self.traced, weights, mesh=self.mesh, rules=RULES, dtype=self.runtime.dtype)

    def prepare(self, prompt: str) -> str:
        """What the tokenizer gets for `prompt`: the prompt itself, unless a family cleans it."""
        return prompt

    @abstractmethod
    def embed(self, params, input_ids: Int[Array, "B L"], attention_mask: Int[Array, "B L"]) -> Float[Array, "B L E"]:
        """The embeddings of padded tokens; traced."""

    def encode(self, config: GenerationConfig, *, negative: bool) -> dict[str, np.ndarray]:
        """``prompt_embeds`` [1, L, E] and, if `negative`, ``negative_prompt_embeds``; L is ``max_sequence_length``."""
        prompts = {"prompt_embeds": config.prompt}
        if negative:
            prompts["negative_prompt_embeds"] = config.negative_prompt
        return {name: self._encode(prompt, config.max_sequence_length) for name, prompt in prompts.items()}

    def _encode(self, prompt: str, length: int) -> Float[np.ndarray, "1 L E"]:
        tokens = self.tokenizer(
            self.prepare(prompt), padding="max_length", max_length=length, truncation=True, return_tensors="np"
        )
        inputs = [
            jax.device_put(tokens[name].astype(np.int32), replicated(self.mesh)) for name in ("input_ids", "attention_mask")
        ]
        run = self.programs.get("text encoder", self.embed, self.params, *inputs)
        with self.runtime.progress.phase("encode"):
            return np.asarray(run(self.params, *inputs))
