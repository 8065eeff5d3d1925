"""Noise as diffusers draws it, and the state that a denoising run begins with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8

from tpuvid.compute.schedule import Schedule


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
