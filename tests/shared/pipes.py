"""Pipelines that are opened once in a session: loading, tracing and compiling take ten times what a small video does."""

from pathlib import Path
from typing import Any

import jax
import tpuvid
from tpuvid.compute.progress import current
from tpuvid.runs.pipeline import Pipeline

_load = tpuvid.load
_kept: dict[str, Pipeline] = {}


def kept(model: str, **options: Any) -> Pipeline:
    """``tpuvid.load(model, **options)``, or what it gave before. Also in its place, for command lines that run in process.

    `free` frees nothing. With a pack everything is new.
    """
    if options.get("pack"):
        return _load(model, **options)
    model = str(Path(model).resolve()) if Path(model).exists() else model
    level = jax.config.read("jax_disable_most_optimizations")
    key = repr((model, level, sorted((name, value) for name, value in options.items() if value is not None)))
    if key not in _kept:
        _kept[key] = _load(model, **options)
        _kept[key].free = lambda: None
    current().take()  # of a run that failed
    return _kept[key]
