"""Guidance as a checkpoint's ``guider/guider_config.json`` sets it. Source: `ClassifierFreeGuidance` of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from tpuvid.contract import GenerationConfig
from tpuvid.errors import InputError


@dataclass(frozen=True)
class Guidance:
    """The guider's settings."""

    guidance_scale: float = 7.5
    """The scale where the user gives none. The other defaults, too, are the guider's own."""
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
        settings = {key: value for key, value in config.items() if not key.startswith("_")}
        if unknown := sorted(set(settings) - set(cls.__dataclass_fields__)):
            raise InputError(f"guider_config.json: {', '.join(unknown)}: no setting of ClassifierFreeGuidance; remove it")
        guidance = cls(**settings)
        for field in fields(cls):
            value = getattr(guidance, field.name)
            good = type(value) is bool if type(field.default) is bool else type(value) in (int, float) and isfinite(value)
            if not good:
                kind = "true or false" if type(field.default) is bool else "a finite number"
                raise InputError(f"guider_config.json: {field.name}={value!r}: needs {kind}")
        if not 0 <= guidance.guidance_rescale <= 1:
            raise InputError(f"guider_config.json: guidance_rescale={guidance.guidance_rescale}: needs a number from 0 to 1")
        if not 0 <= guidance.start <= guidance.stop <= 1:
            raise InputError(f"guider_config.json: start={guidance.start}, stop={guidance.stop}: needs 0 ≤ start ≤ stop ≤ 1")
        return guidance

    @property
    def neutral(self) -> float:
        """The scale that guides nowhere."""
        return 0.0 if self.use_original_formulation else 1.0

    def resolve(self, given: float | None) -> float:
        """The scale that a run takes: `given`, or else the guider's own; neutral where the guider is switched off.

        Raises `InputError` for a given scale that a guider switched off can't take, and for one up to 1 with which the
        guider would guide: tpuvid takes that for no guidance.
        """
        if not self.enabled:
            if given not in (None, self.neutral):
                raise InputError(
                    f"guidance_scale={given}: this checkpoint's guider is switched off "
                    "(guider_config.json: enabled); leave it out"
                )
            return self.neutral
        scale = self.guidance_scale if given is None else given
        if scale <= 1 and scale != self.neutral:
            raise InputError(
                f"guidance_scale={scale}: this checkpoint's guider takes {self.neutral} (no guidance) or more than 1"
            )
        return scale

    def scales(self, config: GenerationConfig) -> Float[np.ndarray, " steps"] | None:
        """The scale of every step, neutral outside of [start, stop); None where no step is guided."""
        count = config.num_inference_steps
        first, end = int(self.start * count), int(self.stop * count)
        if not (self.enabled and config.do_classifier_free_guidance and first < end):
            return None
        scales = [config.guidance_scale if first <= step < end else self.neutral for step in range(count)]
        return np.array(scales, np.float32)

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
