"""What passes between the stages. Imports neither jax nor torch.

Shapes use B batch, F/H/W pixel frames/height/width, f/h/w latent grid, C channels, L text tokens, E width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tpuvid.contract.digests import tensors_digest
from tpuvid.contract.settings import GenerationConfig
from tpuvid.errors import TpuvidError

if TYPE_CHECKING:
    import numpy as np


History = Mapping[str, Mapping[str, Any]]
"""What is known of each stage ("encode", "denoise", "decode"): where its weights came from, how they ran, and the seconds that
each part took."""


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """Named arrays that a stage leaves for the next, and where they come from."""

    model_id: str
    tensors: Mapping[str, np.ndarray]
    history: History = field(default_factory=dict)
    fingerprint: str | None = None
    """The fingerprint of a local checkpoint: see `Checkpoint.fingerprint`."""
    prompts_sha256: str | None = None
    """What the files of a private run say in the place of both prompts; None: they say the prompts. Where only a file of a
    private run is known, both prompts are ""."""

    def sha256(self) -> str:
        """The hash of the arrays: names, dtypes, shapes and values."""
        return tensors_digest(self.tensors)

    def check(self) -> None:
        """Raise `TpuvidError` unless every value is finite."""
        check_finite(self.tensors)


@dataclass(frozen=True, kw_only=True)
class Conditioning(StageResult):
    """What the text encoder makes of a prompt.

    Its arrays have the names of the diffusers pipeline's arguments, for example ``prompt_embeds`` [B, L, E] and
    ``negative_prompt_embeds`` [B, L, E] (absent where guidance is off).
    """

    prompt: str
    negative_prompt: str
    max_sequence_length: int | None
    """The most text tokens of a prompt; None where a foreign file does not say."""


@dataclass(frozen=True, kw_only=True)
class Latents(StageResult):
    """What the diffusion model leaves: ``latents`` [B, C, f, h, w], float32, normalised, and whatever else the model makes."""

    config: GenerationConfig

    @property
    def latents(self) -> np.ndarray:
        """The latents of the picture [B, C, f, h, w]."""
        return self.tensors["latents"]


def check_finite(tensors: Mapping[str, np.ndarray]) -> None:
    """Raise `TpuvidError` for results that hold NaN or infinity."""
    import numpy as np

    for name, value in tensors.items():
        if not np.isfinite(value.astype(np.float32)).all():
            raise TpuvidError(f"the {name} hold NaN or infinity; check the weights (and LoRA), or try --dtype float32")


StepCallback = Callable[[int, int], None]
"""Called after each denoising step with (steps done, steps in all); an exception raised in it stops the run."""
