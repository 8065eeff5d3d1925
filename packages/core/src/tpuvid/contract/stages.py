"""The three stages, as what makes a model has them. Imports neither jax nor torch.

A video is made by ``encode`` (prompt → `Conditioning`), ``denoise`` (→ `Latents`) and ``decode`` (→ frames).
Shapes use B batch, F/H/W pixel frames/height/width, f/h/w latent grid, C channels, L text tokens, E width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from tpuvid.contract.settings import GenerationConfig

if TYPE_CHECKING:
    import numpy as np

    from tpuvid.contract.loop import Loop

STAGES = {"encode": "text encoder", "denoise": "denoiser", "decode": "decoder"}
"""The stages in their order, with who does each, for people."""


class Stage(Protocol):
    """One part of a model. Making it reads configs only, so that inputs are checked before any weight is loaded."""

    def verify(self) -> None:
        """Raise `InputError` unless weights and configs fit together, by names and shapes alone."""

    def load(self) -> None:
        """Put the weights on the devices."""


class TextEncoder(Stage, Protocol):
    def encode(self, config: GenerationConfig, *, negative: bool) -> Mapping[str, np.ndarray]:
        """Embed ``config.prompt``, and the negative prompt where `negative`, as `Conditioning.tensors`."""


class Denoiser(Stage, Protocol):
    def resolve(self, config: GenerationConfig) -> GenerationConfig:
        """`config` with what it leaves to the checkpoint (flow shift, guidance) filled in, so that the record says what ran."""

    def check(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Raise `InputError` if these conditioning tensors, of one prompt, do not fit this model."""

    def denoise(self, tensors: Mapping[str, np.ndarray], config: GenerationConfig, loop: Loop) -> Mapping[str, np.ndarray]:
        """Noise of ``loop.seeds`` → `Latents.tensors`: "latents" [B, C, f, h, w], float32, and what else the model makes.

        `tensors` are of B prompts, [B, …] each; of `config` all holds for each of them but prompts and seed.
        """


class Decoder(Stage, Protocol):
    def check(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Raise `InputError` if `Latents.tensors` of these shapes do not fit this model."""

    def decode(self, tensors: Mapping[str, np.ndarray]) -> Iterator[Mapping[str, np.ndarray]]:
        """`Latents.tensors` → chunks, first to last: "frames" [B, n, H, W, C], float32 in [0, 1], and what goes with them."""
