"""tpuvid: text-to-video inference on Google TPUs.

import tpuvid

pipe = tpuvid.load("wan-tiny")
pipe.generate(prompt="a red circle moving right on a black background").save("circle.mp4")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tpuvid.errors import InputError, TpuvidError
from tpuvid.runs.control import Cancelled, CancelToken, Control

if TYPE_CHECKING:
    from tpuvid.runs.pipeline import Pipeline

__all__ = ["CancelToken", "Cancelled", "Control", "InputError", "TpuvidError", "load"]


def __getattr__(name: str) -> Any:
    """`__version__`, that of the distribution tpuvid-core: its one source is the pyproject.toml."""
    if name == "__version__":
        from importlib.metadata import version

        return version("tpuvid-core")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(model: str, **options: Any) -> Pipeline:
    """A pipeline for a registered model id, a local diffusers folder or a Hub id; see `tpuvid.runs.pipeline.load` for options.

    jax and torch are imported here, not with the package.
    """
    from tpuvid.runs.pipeline import load as load_pipeline

    return load_pipeline(model, **options)
