"""What is installed: models, decoders, step caches, tile sizes, commands. Plugins are loaded one by one: a broken one is a row
in a list and nothing more."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from tpuvid.contract.commands import CommandSpec
from tpuvid.contract.models import DecoderSpec, ModelSpec
from tpuvid.contract.stepcache import StepCache
from tpuvid.contract.wording import suggestion
from tpuvid.errors import InputError
from tpuvid.plugin.loader import Plugin, about, installed_points, loaded

PLUGINS_VARIABLE = "TPUVID_PLUGINS"
CORE = "core"
"""The entry point of tpuvid-core's own plugin, which an allow-list doesn't have to name."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """What several packages register, or one twice: none of them gets it."""

    kind: str
    """ "model id", "decoder", "step cache" or "command"."""
    name: str
    packages: tuple[str, ...]
    plugins: tuple[str, ...]
    """The names of their entry points."""

    def __str__(self) -> str:
        if len(set(self.packages)) == 1:
            return f"{self.kind} {self.name!r} is registered twice by {self.packages[0]}; it has to drop one"
        exclude = " or ".join(f"{PLUGINS_VARIABLE}=-{name}" for name in self.plugins)
        return f"{self.kind} {self.name!r} is registered by {' and '.join(self.packages)}; uninstall one, or set {exclude}"


@dataclass(frozen=True, slots=True)
class Registry:
    plugins: tuple[Plugin, ...]
    conflicts: tuple[Conflict, ...] = ()

    @property
    def models(self) -> dict[str, ModelSpec]:
        return {spec.model_id: spec for plugin in self.plugins for spec in plugin.models}

    @property
    def broken(self) -> list[Plugin]:
        return [plugin for plugin in self.plugins if plugin.error]

    @property
    def problems(self) -> list[str]:
        """A line, for people, for each plugin that doesn't load, and for each conflict."""
        broken = [f"plugin {p.name} ({p.package} {p.version}) does not load: {p.error}" for p in self.broken]
        return broken + [str(conflict) for conflict in self.conflicts]

    def get(self, model_id: str) -> ModelSpec:
        """The spec registered as `model_id`; raises `InputError` with the nearest names."""
        models = self.models
        if model_id in models:
            return models[model_id]
        self._raise_conflict("model id", model_id)
        raise InputError(f"model {model_id!r} is not known; {_suggest(model_id, models)}{self.hint}")

    def command(self, name: str) -> CommandSpec | None:
        """The command registered as `name`; raises `InputError` where several packages register one."""
        self._raise_conflict("command", name)
        return self.commands.get(name)

    def _raise_conflict(self, kind: str, name: str) -> None:
        if conflict := next((c for c in self.conflicts if (c.kind, c.name) == (kind, name)), None):
            raise InputError(str(conflict))

    def require_class(self, pipeline_class: str) -> None:
        """Raise `InputError` if no plugin runs this pipeline."""
        supported = sorted({s.pipeline_class for s in self.models.values()})
        if pipeline_class not in supported:
            raise InputError(
                f"pipeline {pipeline_class!r} has no plugin; "
                f"installed plugins run {', '.join(supported) or 'nothing'}{self.hint}"
            )

    def decoder(self, name: str, spec: ModelSpec) -> DecoderSpec:
        """The decoder `name` for a model; raises `InputError` where there is none."""
        found = [d for plugin in self.plugins for d in plugin.decoders if d.serves(spec)]
        for decoder in found:
            if decoder.name == name:
                return decoder
        names = ", ".join(sorted(d.name for d in found))
        has = f"choose {names}, or leave it out for its own" if names else "has none but its own; leave it out"
        raise InputError(f"decoder={name!r}: {spec.model_id} {'has no such decoder; ' if names else ''}{has}{self.hint}")

    @property
    def step_caches(self) -> dict[str, type[StepCache]]:
        return {step_cache.name: step_cache for plugin in self.plugins for step_cache in plugin.step_caches}

    @property
    def commands(self) -> dict[str, CommandSpec]:
        return {command.name: command for plugin in self.plugins for command in plugin.commands}

    @property
    def block_sizes(self) -> tuple[Path, ...]:
        return tuple(path for plugin in self.plugins for path in plugin.block_sizes)

    def match(self, pipeline_class: str, transformer_config: dict) -> ModelSpec:
        """The spec that a checkpoint of `pipeline_class` runs with: the model whose signature says most of what its transformer
        is, of those that say as much the one of the package with the family; or else the first one of that package."""
        self.require_class(pipeline_class)
        family = [(p, s) for p in self.plugins for s in p.models if s.pipeline_class == pipeline_class]
        own = [spec for plugin, spec in family if spec.load_denoiser.split(".")[0] == plugin.module.split(".")[0]]
        specs = own + [spec for _, spec in family if spec not in own]
        fitting = [s for s in specs if s.signature and all(transformer_config.get(k) == v for k, v in s.signature.items())]
        return max(fitting, key=lambda spec: len(spec.signature), default=specs[0])  # the first of those that say as much

    def packages_of(self, spec: ModelSpec) -> list[str]:
        """The distributions that register the model, and the decoder that it runs with."""
        model_id = spec.twin or spec.model_id
        return [
            p.package
            for p in self.plugins
            if any(s.model_id == model_id for s in p.models)
            or any(d.name == spec.decoder and d.serves(spec) for d in p.decoders)
        ]

    @property
    def hint(self) -> str:
        """What to add where something isn't found: it may be of a plugin that doesn't load."""
        names = ", ".join(plugin.package for plugin in self.broken)
        return f" (not loaded: {names}; see tpuvid doctor)" if names else ""


def _suggest(model_id: str, models: dict[str, ModelSpec]) -> str:
    installed = f"installed: {', '.join(sorted(models)) or 'none: pip install tpuvid-wan'}"
    return suggestion(model_id, models, installed, most=3, cutoff=0.4)


def load_plugins(found: Iterable[EntryPoint | Plugin], selection: str | None = None) -> Registry:
    """Load each entry point on its own; whatever goes wrong in one becomes its `Plugin.error`."""
    found = sorted(found, key=lambda point: point.name)
    points = [point for point in found if isinstance(point, EntryPoint) and _selected(point, selection)]
    plugins = loaded(points) + [row for row in found if isinstance(row, Plugin)]
    plugins += _selection_problems({point.name for point in found}, selection)
    conflicts = _conflicts(plugins)
    plugins = [_without(plugin, conflicts) for plugin in plugins]
    step_caches = {step_cache.name: step_cache for plugin in plugins for step_cache in plugin.step_caches}
    return Registry(tuple(_knowing(plugin, step_caches) for plugin in plugins), conflicts)


def _named(plugin: Plugin) -> dict[str, tuple[str, dict[str, list[Any]]]]:
    """What kind of thing the plugin registers in each field, and those things by every name that they take."""
    found: dict[str, tuple[str, dict[str, list[Any]]]] = {}
    for name, kind, names in (
        ("models", "model id", lambda spec: [spec.model_id]),
        ("decoders", "decoder", lambda decoder: [f"{decoder.name} of {model}" for model in decoder.models]),
        ("step_caches", "step cache", lambda step_cache: [step_cache.name]),
        ("commands", "command", lambda command: [command.name]),
    ):
        taken: dict[str, list[Any]] = defaultdict(list)
        for thing in getattr(plugin, name):
            for each in names(thing):
                taken[each].append(thing)
        found[name] = kind, taken
    return found


def _conflicts(plugins: Iterable[Plugin]) -> tuple[Conflict, ...]:
    owners: dict[tuple[str, str], list[Plugin]] = defaultdict(list)
    for plugin in plugins:
        for kind, taken in _named(plugin).values():
            for name, things in taken.items():
                owners[kind, name] += [plugin] * len(things)
    return tuple(
        Conflict(*named, tuple(p.package for p in found), tuple(p.name for p in found))
        for named, found in owners.items()
        if len(found) > 1
    )


def _without(plugin: Plugin, conflicts: Iterable[Conflict]) -> Plugin:
    """The plugin less what is in a conflict."""
    disputed = {(conflict.kind, conflict.name) for conflict in conflicts}
    left: dict[str, Any] = {}
    for name, (kind, taken) in _named(plugin).items():
        lost = [thing for each, things in taken.items() if (kind, each) in disputed for thing in things]
        left[name] = tuple(thing for thing in getattr(plugin, name) if not any(thing is other for other in lost))
    return replace(plugin, **left)


def _knowing(plugin: Plugin, step_caches: Mapping[str, type[StepCache]]) -> Plugin:
    """The plugin, with models that know all step caches."""
    return replace(plugin, models=tuple(replace(spec, step_caches=step_caches) for spec in plugin.models))


def _words(selection: str | None) -> tuple[set[str], set[str]]:
    """Read "wan,tiny" (only these, and core) or "-wan" (all but these) as (allowed, denied)."""
    words = {word.strip() for word in (selection or "").split(",")} - {""}
    denied = {word.removeprefix("-") for word in words if word.startswith("-")}
    return {word for word in words if not word.startswith("-")}, denied


def _selected(point: EntryPoint, selection: str | None) -> bool:
    allowed, denied = _words(selection)
    is_core = point.name == CORE and (point.dist is None or about(point.dist)[0] == "tpuvid-core")
    return point.name not in denied and (not allowed or point.name in allowed or is_core)


def _selection_problems(names: set[str], selection: str | None) -> Iterator[Plugin]:
    """Rows for what TPUVID_PLUGINS says and can't mean."""
    allowed, denied = _words(selection)
    for name in sorted(allowed | denied):
        if name not in names:
            yield Plugin(name, "?", "?", "?", error=f"{PLUGINS_VARIABLE} names it, but no such plugin is installed")
        elif name in allowed & denied:
            yield Plugin(name, "?", "?", "?", error=f"{PLUGINS_VARIABLE} both allows and denies it; it is denied")


@cache
def registry() -> Registry:
    """The plugins of this environment, loaded once per process."""
    return load_plugins(installed_points(), os.environ.get(PLUGINS_VARIABLE))
