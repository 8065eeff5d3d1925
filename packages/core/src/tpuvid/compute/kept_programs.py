"""Programs that an earlier process has traced and compiled for one stage: a later one runs them at once.

A pack does the same for another machine; what is kept here is this user's own, so that it needs no trust. It is refused, and
made again, on any difference in what programs depend on (`tpuvid.compute.run_key`), and in `tpuvid.files.kept`'s own terms.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tpuvid.compute.packs.pack import deserialized, serialized, signature
from tpuvid.compute.run_key import source_hash
from tpuvid.compute.stage_loader import loader_of
from tpuvid.contract.stages import STAGES
from tpuvid.files.kept import Entry, Kept
from tpuvid.files.versions import LIBRARIES, installed_version
from tpuvid.plugin.registry import registry

if TYPE_CHECKING:
    from jax.sharding import Mesh

CACHE_HIT = "/jax/compilation_cache/cache_hits"
"""What JAX records when a program comes out of its own cache."""


@cache
def environment() -> list[Any]:
    """What all that is kept depends on: the versions of what computes, the sources of `tpuvid.compute` and of every plugin,
    with those of the packages that its models run."""
    plugins = [plugin for plugin in registry().plugins if plugin.error is None]
    named = [plugin.module for plugin in plugins]
    named += [loader_of(model, stage) for plugin in plugins for model in plugin.models for stage in STAGES]
    named += [decoder.load_decoder for plugin in plugins for decoder in plugin.decoders]
    packages = {name.partition(":")[0].split(".")[0] for name in named} - {"tpuvid"}
    found = sorted(package for package in packages if find_spec(package) is not None)  # others are a broken plugin's
    libraries = (*LIBRARIES, "accelerate", "tokenizers", "numpy", "ml_dtypes")
    return [
        list(sys.version_info),
        {name: installed_version(name) for name in libraries},
        source_hash(tuple(found)),
    ]


class KeptPrograms:
    """The programs of one stage. Until it is known what they depend on (`serve`), every one is made when it is asked for."""

    def __init__(self, kept: Kept | None = None):
        self.outlines = kept or Kept()
        """What else is kept for the stage: outlines of modules, schedules."""
        self._programs = Kept()
        self._code: Callable[[], Iterable[ModuleType]] = list

    def of_a_stage(self) -> KeptPrograms:
        """The kept programs of one more stage."""
        return KeptPrograms(self.outlines)

    def serve(self, key: Any, code: Callable[[], Iterable[ModuleType]] = list) -> None:
        """From now on, programs are those of the stage that `key` (JSON-ready) describes.

        `code` gives the Python modules of what it traces.
        """
        self._programs, self._code = self.outlines.within(key), code

    def get(self, how: Any, args: tuple[Any, ...], mesh: Mesh, make: Callable[[], Any]) -> Any:
        """The program that is known by `how` (JSON-ready) and by arguments like `args`, or else what `make` compiles."""
        import numpy as np

        if self._programs.folder is None:
            return make()
        key = [how, signature(args, mesh), _flags()]
        if (found := self._programs.find("program", key)) is not None:
            try:
                return deserialized(found.arrays["program"].tobytes(), found.about, args, mesh)
            except Exception:  # whatever a backend has against it: it is made again
                pass
        with _own_cache(mesh.devices.flat[0].platform != "cpu") as hits:
            program = make()
        if hits:
            return program
        try:
            payload, out_tree = serialized(program)
        except Exception:  # a backend that can't, or results that are no plain trees: it is made each time
            return program
        self._programs.add("program", key, Entry({"program": np.frombuffer(payload, np.uint8)}, out_tree, self._code()))
        return program


def _flags() -> dict[str, str]:
    """JAX's settings in this process, but for those that enter no program."""
    import jax

    apart = ("cache", "log", "debug", "traceback", "platform", "pgle")
    return {name: str(value) for name, value in jax.config.values.items() if not any(word in name for word in apart)}


@contextmanager
def _own_cache(used: bool) -> Iterator[list[str]]:
    """Within it, JAX's own cache of compiled programs is used or not; gives what has come out of it.

    What comes out of it can't be kept: on a CPU (jaxlib 0.10.2), serialized again, it lacks the code of its fusions. There a
    program is compiled anew, in seconds; elsewhere it is traced at each start.
    """
    import jax
    from jax import monitoring
    from jax.experimental.compilation_cache import compilation_cache

    hits: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == CACHE_HIT:
            hits.append(event)

    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]  # JAX adds its settings at run time
    monitoring.register_event_listener(listen)
    try:
        if not used:
            jax.config.update("jax_enable_compilation_cache", False)
            compilation_cache.reset_cache()  # JAX asks once whether to use it
        yield hits
    finally:
        monitoring.unregister_event_listener(listen)
        if not used:
            jax.config.update("jax_enable_compilation_cache", before)
            compilation_cache.reset_cache()
