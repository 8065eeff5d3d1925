"""What goes into a denoising run: inputs that fit, noise as diffusers draws it, and guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from jaxtyping import Float, Shaped, UInt8

from tpuvid.compute.schedule import Schedule
from tpuvid.contract.settings import GenerationConfig
from tpuvid.errors import InputError


def check_embeds(tensors: Mapping[str, np.ndarray], width: int) -> None:
    """Raise `InputError` unless the prompts' embeddings are alike, [1, L, width] and floating point."""
    length = tensors["prompt_embeds"].shape[1:2]
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        embeds = tensors.get(name)
        if embeds is None:
            continue
        if embeds.shape != (1, *length, width) or 0 in embeds.shape or embeds.dtype.kind in "biu":
            raise InputError(
                f"{name} is {embeds.dtype} {list(embeds.shape)}, this model takes [1, L, {width}], both alike; "
                "encode with this model"
            )
        check_finite_embeds(name, embeds)


def check_finite_embeds(name: str, embeds: np.ndarray) -> None:
    """Raise `InputError` where the conditioning `name` holds NaN or infinity."""
    if not np.isfinite(embeds.astype(np.float32)).all():
        raise InputError(f"{name} holds NaN or infinity; encode again")


def check_latents(latents: np.ndarray, channels: int) -> None:
    """Raise `InputError` unless latents are [B, channels, f, h, w]."""
    if latents.ndim != 5 or latents.shape[1] != channels:
        raise InputError(
            f"latents have shape {list(latents.shape)}, this model takes [B, {channels}, f, h, w]; denoise with this model"
        )


def make_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """CPU generators, one per video, so that a seed gives the noise that diffusers draws for it, whatever the device."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def make_noise(shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Float[np.ndarray, "B ..."]:
    """The next standard normal noise of each generator, float32, along a batch; `shape` is one video's."""
    noise = [torch.randn((1, *shape), generator=generator, dtype=torch.float32) for generator in generators]
    return torch.cat(noise).numpy()


def generator_states(generators: Sequence[torch.Generator]) -> UInt8[np.ndarray, "B n"]:
    return torch.stack([generator.get_state() for generator in generators]).numpy()


def restore_generators(generators: Sequence[torch.Generator], states: UInt8[np.ndarray, "B n"]) -> None:
    """Raises `ValueError` for states that are none of as many generators."""
    try:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(torch.from_numpy(state.copy()))  # torch reads the first row of a view, whichever it is of
    except (RuntimeError, TypeError) as error:
        raise ValueError(str(error)) from error


def initial_state(noise: Float[np.ndarray, " ..."], schedule: Schedule) -> Float[np.ndarray, "K ..."]:
    """[sample, memories…] before the first step: the memories are zero."""
    return np.concatenate([noise[None], np.zeros((schedule.memories, *noise.shape), np.float32)])


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
