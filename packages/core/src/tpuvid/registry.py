"""Which models are installed. Plugins are loaded one by one, so that a broken one is a row in a list and nothing more."""

from __future__ import annotations

import difflib
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points

import pluggy

from tpuvid import hookspecs
from tpuvid.errors import InputError
from tpuvid.stages import API_VERSION, ModelSpec

ENTRY_POINT_GROUP = "tpuvid"
PLUGINS_VARIABLE = "TPUVID_PLUGINS"


@dataclass(frozen=True, slots=True)
class Plugin:
    """One entry point, loaded or not."""

    name: str
    package: str
    version: str
    module: str
    models: tuple[ModelSpec, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Registry:
    plugins: tuple[Plugin, ...]
    conflicts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Model ids that several packages register, with those packages: none of them gets it."""

    @property
    def models(self) -> dict[str, ModelSpec]:
        return {spec.model_id: spec for plugin in self.plugins for spec in plugin.models}

    @property
    def broken(self) -> list[Plugin]:
        return [plugin for plugin in self.plugins if plugin.error]

    def get(self, model_id: str) -> ModelSpec:
        """The spec registered as `model_id`; raises `InputError` with the nearest names."""
        models = self.models
        if model_id in models:
            return models[model_id]
        if model_id in self.conflicts:
            packages = " and ".join(self.conflicts[model_id])
            raise InputError(
                f"model {model_id!r} is registered by {packages}; uninstall one, or exclude it with {PLUGINS_VARIABLE}=-name"
            )
        raise InputError(f"model {model_id!r} is not known; {_suggest(model_id, models)}{self._hint()}")

    def require_class(self, pipeline_class: str) -> None:
        """Raise `InputError` if no plugin runs this pipeline."""
        supported = sorted({s.pipeline_class for s in self.models.values()})
        if pipeline_class not in supported:
            raise InputError(
                f"pipeline {pipeline_class!r} has no plugin; installed plugins run {', '.join(supported) or 'nothing'}{self._hint()}"
            )

    def match(self, pipeline_class: str, transformer_config: dict) -> ModelSpec:
        """The spec that a checkpoint of `pipeline_class` runs with: the model that has its transformer's signature,
        or else the first one of the package that implements its family."""
        self.require_class(pipeline_class)
        family = [(p, s) for p in self.plugins for s in p.models if s.pipeline_class == pipeline_class]
        for _, spec in family:
            if all(transformer_config.get(name) == value for name, value in spec.signature.items()):
                return spec
        own = [spec for plugin, spec in family if spec.load_denoiser.split(".")[0] == plugin.module.split(".")[0]]
        return (own or [spec for _, spec in family])[0]

    def package_of(self, model_id: str) -> str | None:
        """The distribution that registers `model_id`."""
        return next((p.package for p in self.plugins if any(s.model_id == model_id for s in p.models)), None)

    def _hint(self) -> str:
        names = ", ".join(plugin.package for plugin in self.broken)
        return f" (not loaded: {names}; see tpuvid doctor)" if names else ""


def _suggest(model_id: str, models: dict[str, ModelSpec]) -> str:
    near = difflib.get_close_matches(model_id, models, n=3, cutoff=0.4)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"installed: {', '.join(sorted(models)) or 'none: pip install tpuvid-wan'}"


def load_plugins(found: Iterable[EntryPoint], selection: str | None = None) -> Registry:
    """Load each entry point on its own; whatever goes wrong in one becomes its `Plugin.error`."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    plugins: list[Plugin] = []
    owners: dict[str, list[str]] = defaultdict(list)
    for point in sorted(found, key=lambda p: p.name):
        dist = point.dist
        plugin = Plugin(point.name, dist.name if dist else point.module, dist.version if dist else "?", point.module)
        if not _selected(point.name, selection):
            continue
        try:
            models = _models_of(manager, point)
        except (Exception, SystemExit) as error:  # whatever a plugin raises while it loads is its own row
            plugin = replace(plugin, error=f"{type(error).__name__}: {error}".splitlines()[0])
        else:
            for spec in models:
                owners[spec.model_id].append(plugin.package)
            plugin = replace(plugin, models=models)
        plugins.append(plugin)
    found_names = {plugin.name for plugin in plugins}
    for name in sorted(_words(selection)):
        if name.lstrip("-") not in found_names and not name.startswith("-"):
            plugins.append(Plugin(name, "?", "?", "?", error=f"{PLUGINS_VARIABLE} names it, but no such plugin is installed"))
    conflicts = {model_id: tuple(packages) for model_id, packages in owners.items() if len(packages) > 1}
    return Registry(tuple(_without(plugin, conflicts) for plugin in plugins), conflicts)


def _without(plugin: Plugin, conflicts: Mapping[str, tuple[str, ...]]) -> Plugin:
    """The plugin less the model ids that another one registers too, and a word about it."""
    shared = [spec.model_id for spec in plugin.models if spec.model_id in conflicts]
    if not shared:
        return plugin
    models = tuple(spec for spec in plugin.models if spec.model_id not in conflicts)
    return replace(plugin, models=models, error=f"model id {shared[0]!r} is registered by {' and '.join(conflicts[shared[0]])}")


def _models_of(manager: pluggy.PluginManager, point: EntryPoint) -> tuple[ModelSpec, ...]:
    module = point.load()
    manager.register(module, name=point.name)
    try:
        manager.check_pending()  # a misspelt hook fails here instead of never being called
        others = [p for p in manager.get_plugins() if p is not module]
        results = manager.subset_hook_caller("tpuvid_models", remove_plugins=others)()
        models = tuple(spec for result in results for spec in result)
        for spec in models:
            if not isinstance(spec, ModelSpec):
                raise TypeError(f"tpuvid_models gave {spec!r}, not a ModelSpec")
            if spec.api_version != API_VERSION:
                raise ValueError(
                    f"{spec.model_id} is built for plugin API {spec.api_version}, this tpuvid has {API_VERSION}; update one of them"
                )
    except BaseException:
        manager.unregister(name=point.name)
        raise
    return models


def _words(selection: str | None) -> list[str]:
    return [word.strip() for word in (selection or "").split(",") if word.strip()]


def _selected(name: str, selection: str | None) -> bool:
    """TPUVID_PLUGINS is "wan,tiny" (only these) or "-wan" (all but these)."""
    words = _words(selection)
    denied = {word[1:] for word in words if word.startswith("-")}
    allowed = {word for word in words if not word.startswith("-")}
    return name not in denied and (not allowed or name in allowed)


@cache
def registry() -> Registry:
    """The plugins of this environment, loaded once per process."""
    return load_plugins(entry_points(group=ENTRY_POINT_GROUP), os.environ.get(PLUGINS_VARIABLE))
