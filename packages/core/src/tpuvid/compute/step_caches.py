"""The step caches that tpuvid has, and the one that a run asks for. Imports neither jax nor torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tpuvid.contract.stepcache import StepCache, made
from tpuvid.plugin.registry import registry

if TYPE_CHECKING:
    from tpuvid.compute.traced import TracedModule
    from tpuvid.contract.settings import GenerationConfig


class Uncached:
    """Every step is full, and nothing is kept."""

    name = "none"

    def full_steps(self, num_inference_steps: int) -> list[bool]:
        return [True] * num_inference_steps

    def full(self, traced: TracedModule, predict: Callable[..., Any], *args: Any) -> tuple[Any, None]:
        return predict(*args), None

    def cached(self, traced: TracedModule, predict: Callable[..., Any], kept: Any, *args: Any) -> Any:
        raise AssertionError("no step is cached")


@dataclass(frozen=True, slots=True)
class DeepCache:
    """Full steps keep what enters the last block; cached ones run that block alone, with this step's timestep.

    Paper: DeepCache (arXiv:2312.00858), whose deep features are here those of all blocks but the last. Full are the steps
    before `start_step`, from there on every `step_interval`-th one, and all from `end_step`.
    """

    start_step: int = 11
    end_step: int = 45
    step_interval: int = 4
    name = "deepcache"

    def full_steps(self, num_inference_steps: int) -> list[bool]:
        between = range(self.start_step, self.end_step, self.step_interval)
        return [not self.start_step <= step < self.end_step or step in between for step in range(num_inference_steps)]

    def full(self, traced: TracedModule, predict: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
        with traced.tapped() as tap:
            output = predict(*args)
        return output, tap.value

    def cached(self, traced: TracedModule, predict: Callable[..., Any], kept: Any, *args: Any) -> Any:
        with traced.tapped(kept):
            return predict(*args)


def step_cache(config: GenerationConfig) -> StepCache:
    """The cache that a checked config asks for."""
    return Uncached() if config.cache is None else made(config, registry().step_caches)
