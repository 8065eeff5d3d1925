"""Step caches: some denoising steps reuse what an earlier one computed. Imports neither jax nor torch.

A cache says which steps run the whole model, what such a full step keeps, and what a cached step runs with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from tpuvid.contract.settings import SETTINGS as ALL_SETTINGS
from tpuvid.contract.settings import GenerationConfig
from tpuvid.errors import InputError

if TYPE_CHECKING:
    from tpuvid.compute.traced import TracedModule

SETTINGS = tuple(name.removeprefix("cache_") for name in ALL_SETTINGS if name.startswith("cache_"))
"""What a cache may let the user choose; each is ``cache_…`` in a `GenerationConfig`."""


@runtime_checkable
class StepCache(Protocol):
    name: str

    def full_steps(self, num_inference_steps: int) -> list[bool]:
        """Whether each step runs the whole model; the first one always does."""

    def full(self, traced: TracedModule, predict: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
        """``predict(*args)``, and the arrays to keep of it; traced."""

    def cached(self, traced: TracedModule, predict: Callable[..., Any], kept: Any, *args: Any) -> Any:
        """``predict(*args)`` by way of what the last full step kept; traced."""


def fill_cache_settings(config: GenerationConfig, known: Mapping[str, type[StepCache]] | None) -> GenerationConfig:
    """`config` with the defaults of its cache, one of those `known` by name, where they are not given.

    None: caches can't be known yet, since the model is not registered; the denoiser asks for them again. Raises `InputError`
    for an unknown cache, settings that it doesn't have, or with which no step would be cached.
    """
    given = _given(config)
    if config.cache is None:
        if given:
            name, value = next(iter(given.items()))
            raise InputError(f"cache_{name}={value}: no cache is switched on; add cache=deepcache or leave it out")
        return config
    if known is None:
        return config
    cache = made(config, known)
    settings = {f"cache_{name}": getattr(cache, name) for name in _settings(cache)}
    if all(cache.full_steps(config.num_inference_steps)):
        said = ", ".join(f"{name}={value}" for name, value in settings.items()) or f"cache={config.cache}"
        raise InputError(
            f"{said}: none of {config.num_inference_steps} steps would be cached; "
            "start earlier, end later or widen the interval"
        )
    return config.override(**settings)


def _given(config: GenerationConfig) -> dict[str, Any]:
    values = {name: getattr(config, f"cache_{name}") for name in SETTINGS}
    return {name: value for name, value in values.items() if value is not None}


def _settings(cache: Any) -> list[str]:
    """The settings of a cache or of its class, which the registry has seen to be a dataclass."""
    return [field.name for field in fields(cache)]


def made(config: GenerationConfig, known: Mapping[str, type[StepCache]]) -> StepCache:
    """The cache that `config` asks for, of the class `known` by its name; raises `InputError`."""
    if config.cache is None or config.cache not in known:
        raise InputError(f"cache={config.cache!r}: choose from {', '.join(sorted(known)) or 'none: no plugin registers one'}")
    kind, given = known[config.cache], _given(config)
    if other := next((name for name in given if name not in _settings(kind)), None):
        raise InputError(f"cache_{other}={given[other]}: {config.cache} has no such setting; leave it out")
    return kind(**given)


def ranges(steps: Iterable[int]) -> str:
    """Step numbers for people: "0-11, 15, 19"."""
    found: list[list[int]] = []
    for step in steps:
        if found and found[-1][-1] == step - 1:
            found[-1] = [found[-1][0], step]
        else:
            found.append([step, step])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)
