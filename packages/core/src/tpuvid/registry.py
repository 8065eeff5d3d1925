"""What is installed: models, decoders, step caches, tile sizes. Plugins are loaded one by one, so that a broken one is a row in a
list and nothing more."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pluggy

from tpuvid import hookspecs
from tpuvid.errors import InputError
from tpuvid.stages import (
    API_VERSION,
    OPTIONAL_FEATURES,
    OPTIONAL_SETTINGS,
    Conformance,
    DecoderSpec,
    GenerationConfig,
    ModelSpec,
    SizeRules,
    check_sampling,
)
from tpuvid.stepcache import SETTINGS as CACHE_SETTINGS
from tpuvid.stepcache import StepCache

ENTRY_POINT_GROUP = "tpuvid"
PLUGINS_VARIABLE = "TPUVID_PLUGINS"
CORE = "core"
"""The entry point of tpuvid-core's own plugin, which an allow-list doesn't have to name."""
NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
LOADER = re.compile(r"[\w.]+:\w+")


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
    error: str | None = None

    @property
    def provides(self) -> list[str]:
        """For people: what it registers."""
        found = [spec.model_id for spec in self.models]
        found += [f"decoder {decoder.name}" for decoder in self.decoders]
        found += [f"step cache {step_cache.name}" for step_cache in self.step_caches]
        return found + ["tile sizes"] * bool(self.block_sizes)


@dataclass(frozen=True, slots=True)
class Conflict:
    """What several packages register, or one twice: none of them gets it."""

    kind: str
    """ "model id", "decoder" or "step cache"."""
    name: str
    packages: tuple[str, ...]

    def __str__(self) -> str:
        packages = " and ".join(self.packages)
        return (
            f"{self.kind} {self.name!r} is registered by {packages}; uninstall one, or exclude it with {PLUGINS_VARIABLE}=-name"
        )


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
        """For people: a line for each plugin that doesn't load, and for each conflict."""
        broken = [f"plugin {p.name} ({p.package} {p.version}) does not load: {p.error}" for p in self.broken]
        return broken + [str(conflict) for conflict in self.conflicts]

    def get(self, model_id: str) -> ModelSpec:
        """The spec registered as `model_id`; raises `InputError` with the nearest names."""
        models = self.models
        if model_id in models:
            return models[model_id]
        if conflict := next((c for c in self.conflicts if (c.kind, c.name) == ("model id", model_id)), None):
            raise InputError(str(conflict))
        raise InputError(f"model {model_id!r} is not known; {_suggest(model_id, models)}{self._hint()}")

    def require_class(self, pipeline_class: str) -> None:
        """Raise `InputError` if no plugin runs this pipeline."""
        supported = sorted({s.pipeline_class for s in self.models.values()})
        if pipeline_class not in supported:
            raise InputError(
                f"pipeline {pipeline_class!r} has no plugin; installed plugins run {', '.join(supported) or 'nothing'}{self._hint()}"
            )

    def decoder(self, name: str, spec: ModelSpec) -> DecoderSpec:
        """The decoder `name` for a model; raises `InputError` where there is none."""
        found = [d for plugin in self.plugins for d in plugin.decoders if d.serves(spec)]
        for decoder in found:
            if decoder.name == name:
                return decoder
        names = ", ".join(sorted(d.name for d in found))
        has = f"choose {names}, or leave it out for its own" if names else "has none but its own; leave it out"
        raise InputError(f"decoder={name!r}: {spec.model_id} {'has no such decoder; ' if names else ''}{has}{self._hint()}")

    @property
    def step_caches(self) -> dict[str, type[StepCache]]:
        return {step_cache.name: step_cache for plugin in self.plugins for step_cache in plugin.step_caches}

    @property
    def block_sizes(self) -> tuple[Path, ...]:
        return tuple(path for plugin in self.plugins for path in plugin.block_sizes)

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

    def packages_of(self, spec: ModelSpec) -> list[str]:
        """The distributions that register the model, and the decoder that it runs with."""
        model_id = spec.twin or spec.model_id
        return [
            p.package
            for p in self.plugins
            if any(s.model_id == model_id for s in p.models)
            or any(d.name == spec.decoder and d.serves(spec) for d in p.decoders)
        ]

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
    for point in sorted(found, key=lambda p: p.name):
        if not _selected(point.name, selection):
            continue
        dist = point.dist
        plugin = Plugin(point.name, dist.name if dist else point.module, dist.version if dist else "?", point.module)
        try:
            if dist:
                _check_requirements(dist)
            with redirect_stdout(sys.stderr):  # what a plugin prints is not what the command was asked for
                plugin = replace(plugin, **_registered_by(manager, point))
        except (Exception, SystemExit) as error:  # whatever a plugin raises while it loads is its own row
            plugin = replace(plugin, error=(f"{type(error).__name__}: {error}".splitlines() or ["?"])[0])
        plugins.append(plugin)
    found_names = {plugin.name for plugin in plugins}
    for name in sorted(_words(selection)):
        if name.lstrip("-") not in found_names and not name.startswith("-"):
            plugins.append(Plugin(name, "?", "?", "?", error=f"{PLUGINS_VARIABLE} names it, but no such plugin is installed"))
    conflicts = _conflicts(plugins)
    return Registry(tuple(_without(plugin, conflicts) for plugin in plugins), conflicts)


def _named(plugin: Plugin) -> dict[str, tuple[str, dict[str, list[Any]]]]:
    """By the plugin's field: what kind of thing it registers there, and those things by every name that they take."""
    found: dict[str, tuple[str, dict[str, list[Any]]]] = {}
    for name, kind, names in (
        ("models", "model id", lambda spec: [spec.model_id]),
        ("decoders", "decoder", lambda decoder: [f"{decoder.name} of {model}" for model in decoder.models]),
        ("step_caches", "step cache", lambda step_cache: [step_cache.name]),
    ):
        taken: dict[str, list[Any]] = defaultdict(list)
        for thing in getattr(plugin, name):
            for each in names(thing):
                taken[each].append(thing)
        found[name] = kind, taken
    return found


def _conflicts(plugins: Iterable[Plugin]) -> tuple[Conflict, ...]:
    owners: dict[tuple[str, str], list[str]] = defaultdict(list)
    for plugin in plugins:
        for kind, taken in _named(plugin).values():
            for name, things in taken.items():
                owners[kind, name] += [plugin.package] * len(things)
    return tuple(Conflict(*named, tuple(packages)) for named, packages in owners.items() if len(packages) > 1)


def _without(plugin: Plugin, conflicts: Iterable[Conflict]) -> Plugin:
    """The plugin less what is in a conflict."""
    disputed = {(conflict.kind, conflict.name) for conflict in conflicts}
    left = {}
    for name, (kind, taken) in _named(plugin).items():
        lost = [thing for each, things in taken.items() if (kind, each) in disputed for thing in things]
        left[name] = tuple(thing for thing in getattr(plugin, name) if not any(thing is other for other in lost))
    return replace(plugin, **left)


def _check_requirements(dist: Distribution) -> None:
    """Raise `ImportError` where a package that `dist` requires is missing, or is a tpuvid package of another version than it declares."""
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
        if needed.name.startswith("tpuvid") and not needed.specifier.contains(installed, prereleases=True):
            raise ImportError(
                f"{dist.name} {dist.version} needs {wanted}, and {installed} is installed; pip install -U {dist.name}, or '{wanted}'"
            )


def _registered_by(manager: pluggy.PluginManager, point: EntryPoint) -> dict[str, tuple[Any, ...]]:
    """What the module of an entry point registers, checked, by the field of `Plugin`."""
    module = point.load()
    manager.register(module, name=point.name)
    try:
        manager.check_pending()  # a misspelt hook fails here instead of never being called
        others = [p for p in manager.get_plugins() if p is not module]
        found: dict[str, tuple[Any, ...]] = {}
        for name, check in CHECKS.items():
            results = manager.subset_hook_caller(f"tpuvid_{name}", remove_plugins=others)()
            found[name] = tuple(thing for result in results for thing in result)
            for thing in found[name]:
                check(thing)
    except BaseException:
        manager.unregister(name=point.name)
        raise
    return found


def _check_kind(hook: str, thing: Any, kind: type) -> None:
    if not isinstance(thing, kind):
        raise TypeError(f"{hook} gave {thing!r}, not a {kind.__name__}")


def _check_fields(name: str, spec: Any, kinds: Mapping[type, Iterable[str]]) -> None:
    for kind, names in kinds.items():
        for each in names:
            if not isinstance(value := getattr(spec, each), kind):
                raise TypeError(f"{name}: {each}={value!r} is no {kind.__name__}")
    for each in (f.name for f in fields(spec) if f.name.startswith("load_")):
        if not LOADER.fullmatch(value := getattr(spec, each)):
            raise ValueError(f"{name}: {each}={value!r} is not of the form 'package.module:Class'")
    if spec.api_version != API_VERSION:
        raise ValueError(
            f"{name} is built for plugin API {spec.api_version}, this tpuvid has {API_VERSION}; update one of them"
        )


def _check_model(spec: Any) -> None:
    """Raise unless a `ModelSpec` is complete, and its defaults obey its own rules."""
    _check_kind("tpuvid_models", spec, ModelSpec)
    if not (isinstance(spec.model_id, str) and NAME.fullmatch(spec.model_id)):
        raise ValueError(f"model_id={spec.model_id!r} needs letters, digits, '.', '-', '_' or '+'")
    _check_fields(
        spec.model_id,
        spec,
        {
            str: ("family", "pipeline_class", "checkpoint", "parameters", "load_text_encoder", "load_denoiser", "load_decoder"),
            Mapping: ("signature", "components"),
            GenerationConfig: ("defaults",),
            SizeRules: ("rules",),
            Conformance | None: ("conformance",),
        },
    )
    if set(spec.components) != {"encode", "denoise", "decode"}:
        raise ValueError(f"{spec.model_id}: components of {sorted(spec.components)}, not of encode, denoise and decode")
    known = OPTIONAL_SETTINGS | OPTIONAL_FEATURES
    if unknown := set(spec.takes) - set(known):
        raise ValueError(f"{spec.model_id}: takes {sorted(unknown)[0]!r}; choose from {', '.join(known)}")
    check_sampling(spec.defaults)
    spec.rules.check(height=spec.defaults.height, width=spec.defaults.width, num_frames=spec.defaults.num_frames)


def _check_decoder(decoder: Any) -> None:
    _check_kind("tpuvid_decoders", decoder, DecoderSpec)
    _check_fields(f"decoder {decoder.name!r}", decoder, {str: ("name", "checkpoint", "component", "load_decoder")})
    if isinstance(decoder.models, str) or not all(isinstance(model, str) for model in decoder.models):
        raise TypeError(f"decoder {decoder.name!r}: models={decoder.models!r} is no tuple of model ids")


def _check_step_cache(step_cache: Any) -> None:
    if not (isinstance(step_cache, type) and is_dataclass(step_cache) and isinstance(step_cache(), StepCache)):
        raise TypeError(f"tpuvid_step_caches gave {step_cache!r}, not a dataclass with name, full_steps, full and cached")
    names = {f.name for f in fields(step_cache)}
    if not isinstance(step_cache.name, str) or not names <= set(CACHE_SETTINGS):
        raise TypeError(
            f"step cache {step_cache.name!r}: its fields are {sorted(names)}; choose from {', '.join(CACHE_SETTINGS)}"
        )


def _check_block_sizes(path: Any) -> None:
    _check_kind("tpuvid_block_sizes", path, Path)
    if not path.is_file():
        raise FileNotFoundError(f"tpuvid_block_sizes gave {path}, which does not exist")


CHECKS = {
    "models": _check_model,
    "decoders": _check_decoder,
    "step_caches": _check_step_cache,
    "block_sizes": _check_block_sizes,
}
"""What may go wrong with what each hook gives."""


def _words(selection: str | None) -> list[str]:
    return [word.strip() for word in (selection or "").split(",") if word.strip()]


def _selected(name: str, selection: str | None) -> bool:
    """TPUVID_PLUGINS is "wan,tiny" (only these, and core) or "-wan" (all but these)."""
    words = _words(selection)
    denied = {word[1:] for word in words if word.startswith("-")}
    allowed = {word for word in words if not word.startswith("-")}
    return name not in denied and (not allowed or name in allowed or name == CORE)


@cache
def registry() -> Registry:
    """The plugins of this environment, loaded once per process."""
    return load_plugins(entry_points(group=ENTRY_POINT_GROUP), os.environ.get(PLUGINS_VARIABLE))
