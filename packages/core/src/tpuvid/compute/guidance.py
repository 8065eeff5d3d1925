"""Classifier-free guidance: its scales, and how it joins what the model says of both prompts."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Shaped

from tpuvid.contract.settings import GenerationConfig


def guide(output: Float[Array, "B2 ..."], scale: Float[Array, ""]) -> Float[Array, "B ..."]:
    """Classifier-free guidance (arXiv:2207.12598) of a batch with the prompt's half first, the negative prompt's second."""
    conditional, unconditional = jnp.split(output, 2)
    return unconditional + scale * (conditional - unconditional)


def guidance_scales(config: GenerationConfig) -> Float[np.ndarray, " steps"] | None:
    """The scale of every step; None where guidance is off and the negative prompt plays no part."""
    if not config.do_classifier_free_guidance:
        return None
    return np.full(config.num_inference_steps, config.guidance_scale, np.float32)


def with_negative(
    tensors: Mapping[str, np.ndarray], name: str, scales: Float[np.ndarray, " steps"] | None
) -> Shaped[np.ndarray, "B2 ..."]:
    """The conditioning `name`; with guidance, that of the negative prompt follows it in the batch."""
    parts = [tensors[name]] if scales is None else [tensors[name], tensors[f"negative_{name}"]]
    return np.concatenate(parts)
