"""A text encoder of transformers on a mesh: what every family's text encoding stands on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax import Array
from jaxtyping import Float, Int
from torch import nn

from tpuvid.compute.mesh import Rule, split_sizes
from tpuvid.compute.parameters import load_parameters, match_parameters
from tpuvid.compute.progress import current
from tpuvid.compute.runtime import LEAST_EFFORT, Runtime, replicated
from tpuvid.compute.scanned import Scan
from tpuvid.compute.traced import TracedModule
from tpuvid.errors import InputError
from tpuvid.files.checkpoint import Checkpoint

Embed = Callable[..., Float[Array, "B L E"]]
"""(params, input_ids [B, L], attention_mask [B, L]) → embeddings [B, L, E]; traced."""


class Encoder:
    """One text encoder: its parameters on a mesh, its program, and tokens through it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        runtime: Runtime,
        module: nn.Module | Callable[[], nn.Module],
        *,
        heads: Sequence[str],
        rules: Sequence[Rule],
        component: str = "text_encoder",
        unused: Sequence[str] = (),
        scan: Mapping[str, Scan] | None = None,
    ):
        """`module`: of the component's config.json, or a function that makes it of that. `heads`: entries of the config that
        a mesh has to divide; `unused`: prefixes of weights that `module` leaves out."""
        self.checkpoint, self.runtime, self.component = checkpoint, runtime, component
        self.rules, self.unused = rules, unused
        config = checkpoint.config(component)
        self.traced = TracedModule(module, scan=scan, kept=runtime.kept.outlines, key=config)
        numbers = {self.traced.config[name] for name in heads}
        self.mesh = runtime.encoder_mesh(numbers | split_sizes(self.traced.parameters(runtime.dtype), rules))
        self.programs = runtime.programs(self.mesh, effort=LEAST_EFFORT)

    def verify(self) -> None:
        match_parameters(self.traced, self.checkpoint.weights(self.component), ignore=self.unused)

    def load(self) -> None:
        weights, dtype = self.checkpoint.weights(self.component), self.runtime.dtype
        self.params = load_parameters(self.traced, weights, mesh=self.mesh, rules=self.rules, dtype=dtype, ignore=self.unused)
        self.params |= self.runtime.put(self.traced.buffers(), replicated(self.mesh))

    def run(self, embed: Embed, tokens: Mapping[str, Any]) -> Float[np.ndarray, "B L E"]:
        """Embeddings of "input_ids" and "attention_mask" [B, L], as a tokenizer gives them."""
        inputs: list[Int[Array, "B L"]] = [
            self.runtime.put(np.asarray(tokens[name], np.int32), replicated(self.mesh))
            for name in ("input_ids", "attention_mask")
        ]
        run = self.programs.get(self.component.replace("_", " "), embed, self.params, *inputs)
        with current().phase("encode", detail=True):
            return self.runtime.fetch(run(self.params, *inputs))


def check_vocabulary(name: str, tokenizer: Any, encoder: Encoder) -> None:
    """Raise `InputError` if the tokenizer of component `name` gives tokens that the encoder has no embedding of."""
    words = encoder.traced.outline.words
    if words is not None and len(tokenizer) > words:
        raise InputError(
            f"{name} has {len(tokenizer)} words, {encoder.component} embeds {words}: they are of two models; "
            "download both again"
        )
