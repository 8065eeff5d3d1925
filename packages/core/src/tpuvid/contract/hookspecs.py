"""All that a plugin can do. A plugin is a module named by an entry point of the group ``tpuvid``.

from tpuvid.contract import ModelSpec, hookimpl

@hookimpl
def tpuvid_models():
    return [ModelSpec(...)]

Each hook is called when the plugins are listed, so none may import jax or torch. The package's own use of each:
``tpuvid_wan.plugin`` (models, block sizes), ``tpuvid.cli.builtin`` (step caches, commands), ``tpuvid_tiny.plugin`` (decoders).
"""

from collections.abc import Iterable
from pathlib import Path

import pluggy

from tpuvid.contract.commands import CommandSpec
from tpuvid.contract.models import DecoderSpec, ModelSpec
from tpuvid.contract.stepcache import StepCache

PROJECT = "tpuvid"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def tpuvid_models() -> Iterable[ModelSpec]:
    """The models that this package provides."""


@hookspec
def tpuvid_decoders() -> Iterable[DecoderSpec]:
    """Decoders for models that this or another package provides: ``--decoder NAME``."""


@hookspec
def tpuvid_step_caches() -> Iterable[type[StepCache]]:
    """Step caches for ``--cache NAME``: frozen dataclasses whose fields are some of ``start_step``, ``end_step`` and
    ``step_interval``, with defaults, and whose ``name`` nobody else has."""


@hookspec
def tpuvid_block_sizes() -> Iterable[Path]:
    """Tables of attention tile sizes, as ``tpuvid tune attention --output`` writes, for the shapes of this package's models."""


@hookspec
def tpuvid_commands() -> Iterable[CommandSpec]:
    """Commands, which ``tpuvid NAME`` imports and runs. The names of tpuvid-core's own can't be taken."""
