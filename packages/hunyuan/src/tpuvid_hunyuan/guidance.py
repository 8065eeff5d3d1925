"""Guidance as a checkpoint's ``guider/guider_config.json`` sets it. Source: `ClassifierFreeGuidance` of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float
from tpuvid.errors import InputError


@dataclass(frozen=True)
class Guidance:
    """Every setting of the guider but ``guidance_scale``, which is the user's."""

    guidance_rescale: float = 0.0
    use_original_formulation: bool = False
    start: float = 0.0
    stop: float = 1.0
    enabled: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Guidance:
        """Raises `InputError` for another guider, and for settings that are none of this one."""
        name = config.get("_class_name")
        if name != "ClassifierFreeGuidance":
            raise InputError(f"guider {name!r}: HunyuanVideo runs with ClassifierFreeGuidance; change guider_config.json")
        settings = {key: value for key, value in config.items() if not key.startswith("_") and key != "guidance_scale"}
        if unknown := sorted(set(settings) - set(cls.__dataclass_fields__)):
            raise InputError(f"guider_config.json: {', '.join(unknown)}: no setting of ClassifierFreeGuidance; remove it")
        guidance = cls(**settings)
        if not 0 <= guidance.start <= guidance.stop <= 1:
            raise InputError(f"guider_config.json: start={guidance.start}, stop={guidance.stop}: needs 0 ≤ start ≤ stop ≤ 1")
        return guidance

    def steps(self, count: int) -> list[bool]:
        """Which of `count` steps are guided."""
        first, end = int(self.start * count), int(self.stop * count)
        return [self.enabled and first <= step < end for step in range(count)]

    def guide(self, output: Float[Array, "B2 ..."], scale: Float[Array, ""]) -> Float[Array, "B ..."]:
        """One prediction of a batch that holds the prompt's half first, the negative prompt's second."""
        conditional, unconditional = jnp.split(output, 2)
        base = conditional if self.use_original_formulation else unconditional
        guided = base + scale * (conditional - unconditional)
        if self.guidance_rescale > 0:  # arXiv:2305.08891, section 3.4
            rescaled = guided * (_std(conditional) / _std(guided))
            guided = self.guidance_rescale * rescaled + (1 - self.guidance_rescale) * guided
        return guided


def _std(x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    return jnp.std(x, axis=range(1, x.ndim), ddof=1, keepdims=True)
