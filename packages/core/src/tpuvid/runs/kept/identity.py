"""What identifies a run: the keys of all that is kept of it are views of one object. Imports neither jax nor torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from tpuvid.contract.digests import digest_of
from tpuvid.contract.models import ModelSpec
from tpuvid.contract.options import Options
from tpuvid.contract.settings import GenerationConfig
from tpuvid.contract.stages import STAGES
from tpuvid.files.checkpoint import Checkpoint

WEIGHTS = ("model_id", "checkpoint", "revision", "fingerprint", "loras")
VIEWS = {
    "request": (*WEIGHTS, "others", "options", "configs", "metadata", "prompt_in_metadata"),
    "folder": (*WEIGHTS, "options", "configs"),
    "embeddings": (*WEIGHTS, "options", "configs"),
    "latents": (*WEIGHTS, "options", "configs"),
    "denoising": (*WEIGHTS, "options", "configs", "conditioning"),
}
"""What each kind of key depends on: a video as it is written, the folder of its work, the files in it."""
OPTIONS_OF = {
    "request": tuple(STAGES),
    "folder": ("encode", "denoise"),
    "embeddings": ("encode",),
    "latents": ("encode", "denoise"),
    "denoising": ("denoise",),
}
"""The stages whose options each kind of key has."""


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """All that decides what a run computes and writes."""

    model_id: str
    checkpoint: str | None
    """The repository of weights that are no folder's."""
    revision: str | None = None
    """The repository's revision, known once the weights are there."""
    fingerprint: str | None
    loras: Sequence[Mapping[str, Any]]
    others: Mapping[str, str]
    """The components that another checkpoint has, with its hash."""
    options: Options
    configs: tuple[GenerationConfig, ...] = ()
    """The configs of the videos that are made together."""
    conditioning: str | None = None
    """The hash of the embeddings."""
    metadata: bool = True
    prompt_in_metadata: bool = True

    @classmethod
    def of(cls, spec: ModelSpec, checkpoint: Checkpoint, options: Options, **more: Any) -> RunIdentity:
        return cls(
            model_id=spec.model_id, checkpoint=checkpoint.source if checkpoint.folder is None else None,
            fingerprint=checkpoint.fingerprint(), loras=checkpoint.lora_record(), others=checkpoint.others_record(),
            options=options, **more,
        )  # fmt: skip

    def view(self, kind: str) -> dict[str, Any]:
        """What a key of `kind` (of `VIEWS`) depends on, JSON-ready."""
        configs = [c.embeddings_key() if kind == "embeddings" else c.to_dict() for c in self.configs]
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name in VIEWS[kind]}
        return found | {"options": self.options.key(*OPTIONS_OF[kind]), "configs": configs}

    def key(self, kind: str, *configs: GenerationConfig) -> str:
        """The hash of a view, of a run of `configs` where they are given."""
        return digest_of(replace(self, configs=configs or self.configs).view(kind))[:16]
