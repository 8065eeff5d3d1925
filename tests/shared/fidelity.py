"""tpuvid beside a stock diffusers pipeline: the figures, their limits and their table."""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tpuvid.contract import Conditioning, Latents
from tpuvid.runs.pipeline import Pipeline


@dataclass(frozen=True)
class Case:
    name: str
    checkpoint: Any
    """What to make (its `save` writes a folder), or a registered model id."""
    settings: dict
    prompt: str = "a red cat &amp;amp; the  moon"
    negative_prompt: str = "blue dog"
    vae_tiling: bool = False
    slow: bool = True
    """Whether only `make test-all` runs it: of each family two are enough for a start."""


@dataclass(frozen=True)
class Fidelity:
    """Largest absolute difference of each stage, relative to the reference tensor's largest value; frames in steps of 255."""

    embeds: float
    latents: float
    decoded: float
    frames: float

    def check(self) -> None:
        assert max(self.embeds, self.latents, self.decoded) <= 1e-4 and self.frames <= 2, self


def compare_stages(
    pipe: Pipeline, case: Case, conditioning: Conditioning, embeds: float, latents: np.ndarray, frames: np.ndarray
) -> Fidelity:
    """Each stage on the reference's input, and the whole from prompt to frames; `latents` and `frames` are the reference's."""
    found = pipe.denoise(conditioning, **{k: v for k, v in case.settings.items() if k != "max_sequence_length"})
    decoded = pipe.decode(Latents(model_id=pipe.spec.model_id, tensors={"latents": latents}, config=found.config)).frames
    config = pipe.resolve(pipe.spec.configure(prompt=case.prompt, negative_prompt=case.negative_prompt, **case.settings))
    whole = pipe.decode(pipe.denoise_config(pipe.encode_config(config), config)).frames
    return Fidelity(
        embeds=embeds,
        latents=relative(found.latents, latents),
        decoded=relative(decoded, frames),
        frames=float(np.abs(whole - frames).max() * 255),
    )


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def parametrized(cases: Iterable[Case]) -> pytest.MarkDecorator:
    """For a test of each `case`."""
    marked = [pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else []) for case in cases]
    return pytest.mark.parametrize("case", marked)


def print_table(cases: Iterable[Case], measure: Callable[[Case, Path], Fidelity]) -> None:
    print("| checkpoint | embeddings | latents | decode | frames (of 255) |\n|---|---|---|---|---|")
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            f = measure(case, Path(folder))
        print(f"| {case.name} | {f.embeds:.1e} | {f.latents:.1e} | {f.decoded:.1e} | {f.frames:.4f} |", flush=True)
