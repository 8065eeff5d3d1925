"""The way from a model's description to its stages. Imports neither jax nor torch before a stage does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tpuvid.compute.lock import TRACING
from tpuvid.contract.models import ModelSpec, imported
from tpuvid.contract.stages import STAGES
from tpuvid.errors import TpuvidError

if TYPE_CHECKING:
    from tpuvid.compute.runtime import Runtime
    from tpuvid.files.checkpoint import Checkpoint


def loader_of(spec: ModelSpec, stage: str) -> str:
    """The "module:callable" that makes `stage`."""
    return getattr(spec, f"load_{STAGES[stage].replace(' ', '_')}")


def open_stage(spec: ModelSpec, stage: str, checkpoint: Checkpoint, runtime: Runtime) -> Any:
    """Import and call what makes `stage` ("encode", "denoise" or "decode"); no weights are loaded."""
    loader = loader_of(spec, stage)
    with TRACING:  # libraries that import their parts when they are asked for aren't safe in threads either
        try:
            made_by = imported(loader)
        except (ImportError, AttributeError) as error:
            raise TpuvidError(
                f"{spec.model_id}: {loader} can't be imported ({error}); mend its package, or install it again"
            ) from error
        return made_by(checkpoint, runtime)
