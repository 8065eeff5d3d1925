"""All that a plugin can do. A plugin is a module named by an entry point of the group ``tpuvid``.

from tpuvid.hookspecs import hookimpl

@hookimpl
def tpuvid_models():
    return [ModelSpec(...)]
"""

from collections.abc import Iterable

import pluggy

from tpuvid.stages import ModelSpec

PROJECT = "tpuvid"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def tpuvid_models() -> Iterable[ModelSpec]:
    """The models that this package provides. Must not import jax or torch."""
