"""What the conformance suite checks: models that the same code runs, with a small checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax

from tpuvid.compute.runtime import Runtime
from tpuvid.contract.layout import MeshConfig
from tpuvid.contract.models import ModelSpec, imported
from tpuvid.contract.values import Conditioning, Latents
from tpuvid.files.checkpoint import Checkpoint
from tpuvid.runs.pipeline import Pipeline
from tpuvid.runs.video import Video

PROMPT, OTHER_PROMPT, NEGATIVE_PROMPT = 'a red cat under a sign that says "MOON"', "a blue dog on the grass", "blurry"


@dataclass
class Subject:
    """Models that the same code runs, and the small checkpoint that it is run with."""

    specs: Sequence[ModelSpec]
    checkpoint: Path | None
    scratch: Path

    @property
    def spec(self) -> ModelSpec:
        return self.specs[0]

    @cached_property
    def folder(self) -> Path:
        """The checkpoint: the user's, the random one of the model's `Conformance`, or its own inside a package."""
        if self.checkpoint is not None:
            return self.checkpoint
        if self.spec.conformance is not None:
            folder = self.scratch / "checkpoint"
            imported(self.spec.conformance.random_checkpoint)(folder)
            return folder
        package, colon, inner = self.spec.checkpoint.partition(":")
        assert colon, "the spec has no conformance, and its checkpoint is not in a package; give it one, or pass --checkpoint"
        return Path(str(files(package))) / inner

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings of a small video."""
        if self.spec.conformance is not None:
            return dict(self.spec.conformance.settings)
        return {"num_inference_steps": 3, "num_frames": 1 + 2 * self.spec.rules.frame_step}

    def pipeline(self, folder: Path | None = None, *, devices: int = 1, mesh: str | None = None) -> Pipeline:
        """The pipeline in float32, of `folder` where it is given, else of the subject's own."""
        folder = folder or self.folder
        runtime = Runtime.create(
            dtype="float32", devices=jax.devices()[:devices], mesh_config=None if mesh is None else MeshConfig.parse(mesh)
        )
        spec = replace(self.spec, model_id=str(folder), twin=self.spec.model_id)
        return Pipeline(spec, Checkpoint(str(folder), folder=folder), runtime)

    @cached_property
    def pipe(self) -> Pipeline:
        return self.pipeline()

    def generate(self, pipe: Pipeline | None = None, **changes: Any) -> Video:
        settings = {"prompt": PROMPT, "negative_prompt": NEGATIVE_PROMPT} | self.settings | changes
        return (pipe or self.pipe).generate(**settings)

    @cached_property
    def conditioning(self) -> Conditioning:
        return self.pipe.encode(PROMPT, NEGATIVE_PROMPT, max_sequence_length=self.settings.get("max_sequence_length"))

    @cached_property
    def latents(self) -> Latents:
        return self.pipe.denoise(self.conditioning, **self.denoising)

    @cached_property
    def denoising(self) -> dict[str, Any]:
        return {name: value for name, value in self.settings.items() if name != "max_sequence_length"}

    @cached_property
    def video(self) -> Video:
        return self.generate()
