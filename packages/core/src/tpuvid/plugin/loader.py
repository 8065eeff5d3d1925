"""The way from entry points to what their modules register. Whatever goes wrong in one is a line about that one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, distribution, distributions, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from tpuvid.contract import hookspecs
from tpuvid.contract.commands import CommandSpec
from tpuvid.contract.models import DecoderSpec, ModelSpec
from tpuvid.contract.stepcache import StepCache
from tpuvid.contract.wording import suggestion
from tpuvid.plugin.checks import CHECKS

ENTRY_POINT_GROUP = "tpuvid"
LONGEST = 300
"""Letters of a stranger's error that are shown."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """One entry point, loaded or not."""

    name: str
    package: str
    version: str
    module: str
    models: tuple[ModelSpec, ...] = ()
    decoders: tuple[DecoderSpec, ...] = ()
    step_caches: tuple[type[StepCache], ...] = ()
    block_sizes: tuple[Path, ...] = ()
    commands: tuple[CommandSpec, ...] = ()
    error: str | None = None

    @property
    def provides(self) -> list[str]:
        """What it registers, for people."""
        found = [spec.model_id for spec in self.models]
        found += [f"decoder {decoder.name}" for decoder in self.decoders]
        found += [f"step cache {step_cache.name}" for step_cache in self.step_caches]
        found += [f"command {command.name}" for command in self.commands]
        return found + ["tile sizes"] * bool(self.block_sizes)


def installed_points() -> Iterator[EntryPoint | Plugin]:
    """The entry points of every distribution; for one whose metadata can't be read, a row that says so."""
    seen = set()
    for dist in distributions():
        try:
            points = [point for point in dist.entry_points if point.group == ENTRY_POINT_GROUP]
            problem = None
        except Exception as error:
            points, problem = [], f"its entry_points.txt can't be read ({said(error)}); install it again"
        if not (points or problem):
            continue
        name, number = about(dist)
        if name in seen:  # another one on a later path, which Python doesn't import
            continue
        seen.add(name)
        yield from points
        if problem:
            yield Plugin(name, name, number, "?", error=problem)


def loaded(points: Iterable[EntryPoint]) -> list[Plugin]:
    """The plugins of these entry points, each loaded on its own."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return [_loaded(manager, point) for point in points]


def _loaded(manager: pluggy.PluginManager, point: EntryPoint) -> Plugin:
    package, number = about(point.dist) if point.dist else (point.value, "?")
    plugin = Plugin(point.name, package, number, point.value.partition(":")[0].strip())
    try:
        if point.dist:
            _check_requirements(point.dist)
        if not all(word.isidentifier() for word in plugin.module.split(".")):
            raise ImportError(f"its entry point names {point.value!r}, which is no module; write it with '_' and '.'")
        with _printing_to_stderr():
            return replace(plugin, **_registered_by(manager, point))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also what is no Exception, as what a Rust extension panics with
        return replace(plugin, error=said(error))


def said(error: BaseException) -> str:
    """An error of a stranger's code in one line that a terminal can show."""
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:
        text = f"{type(error).__name__}, which can't say what it is"
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def about(dist: Distribution) -> tuple[str, str]:
    """Name and version; a half-removed distribution has neither."""
    name: str | None
    number: str | None
    try:
        name, number = dist.metadata["Name"], dist.metadata["Version"]
    except Exception:  # it differs by Python's version what is raised
        name = number = None
    folder: str = getattr(getattr(dist, "_path", None), "name", "?")
    return name or folder, number or "?"


@contextmanager
def _printing_to_stderr() -> Iterator[None]:
    """What a plugin prints is not what the command was asked for, however it prints."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # one of them is closed
        yield
        return
    try:
        with redirect_stdout(sys.stderr):  # which may be no file of the system's, but a test's
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _check_requirements(dist: Distribution, above: tuple[str, ...] = ()) -> None:
    """Raise `ImportError` where a requirement of `dist` is missing, or is a tpuvid package of another version than declared.

    So too for what the tpuvid packages among them require: their code is to run.
    """
    from packaging.requirements import Requirement

    for text in dist.requires or ():
        needed = Requirement(text)
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        wanted = f"{needed.name}{needed.specifier}"
        try:
            installed = version(needed.name)
        except PackageNotFoundError:
            if find_spec(needed.name.replace("-", "_")) is None:  # a fork may bring the module under another name
                raise ImportError(f"{dist.name} needs {wanted}, which is not installed; pip install '{wanted}'") from None
            continue
        if not needed.name.startswith("tpuvid"):
            continue
        if not needed.specifier.contains(installed, prereleases=True):
            raise ImportError(
                f"{dist.name} {dist.version} needs {wanted}, and {installed} is installed; "
                f"pip install -U {dist.name}, or '{wanted}'"
            )
        if needed.name not in above:
            _check_requirements(distribution(needed.name), (*above, needed.name))


def _registered_by(manager: pluggy.PluginManager, point: EntryPoint) -> dict[str, Any]:
    """What the module of an entry point registers, checked, by the field of `Plugin`."""
    module = point.load()
    _check_hooks(module)
    name = manager.register(module, name=f"{point.dist and point.dist.name}:{point.name}")
    try:
        others = [p for p in manager.get_plugins() if p is not module]
        found: dict[str, tuple[Any, ...]] = {}
        for field, check in CHECKS.items():
            results = manager.subset_hook_caller(f"tpuvid_{field}", remove_plugins=others)()
            found[field] = tuple(thing for result in results for thing in result)
            for thing in found[field]:
                check(thing)
    except BaseException:
        manager.unregister(name=name)
        raise
    return found


def _check_hooks(module: ModuleType) -> None:
    """Raise `TypeError` for a hook that would never be called, and where there is none."""
    known = [f"tpuvid_{field}" for field in CHECKS]
    marked = 0
    for name, value in vars(module).items():
        is_marked = hasattr(value, f"{hookspecs.PROJECT}_impl")
        if name in known and callable(value) and not is_marked:
            raise TypeError(f"{name} is not marked with @hookimpl of tpuvid.contract.hookspecs")
        if is_marked and name not in known:
            raise TypeError(f"hook {name!r} is not known; {suggestion(name, known, cutoff=0)}")
        marked += is_marked
    if not marked:
        raise TypeError(
            f"{module.__name__} has no hook; mark a function tpuvid_models with @hookimpl of tpuvid.contract.hookspecs"
        )
