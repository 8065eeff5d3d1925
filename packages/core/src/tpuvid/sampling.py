"""What every denoiser does around its model: noise as diffusers draws it, guidance, and the loop over a `Schedule`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from jaxtyping import Float

from tpuvid.progress import Progress
from tpuvid.schedule import Schedule
from tpuvid.stages import StepCallback

Step = Callable[[Array, np.ndarray, np.ndarray], Array]
"""(state [K, …], timestep, weights [K, K+1]) → the next state."""


def make_generator(seed: int) -> torch.Generator:
    """A CPU generator, so that a seed gives the noise that diffusers draws for it, whatever the device."""
    return torch.Generator("cpu").manual_seed(seed)


def make_noise(shape: tuple[int, ...], generator: torch.Generator) -> Float[np.ndarray, "..."]:
    """The next standard normal noise of `generator`, float32."""
    return torch.randn(shape, generator=generator, dtype=torch.float32).numpy()


def initial_state(noise: Float[np.ndarray, "..."], schedule: Schedule) -> Float[np.ndarray, "K ..."]:
    """[sample, memories…] before the first step: the memories are zero."""
    return np.concatenate([noise[None], np.zeros((schedule.memories, *noise.shape), np.float32)])


def guide(output: Float[Array, "B2 ..."], scale: Float[Array, ""]) -> Float[Array, "B ..."]:
    """Classifier-free guidance (arXiv:2207.12598) of a batch that holds the prompt's half first, the negative prompt's second."""
    conditional, unconditional = jnp.split(output, 2)
    return unconditional + scale * (conditional - unconditional)


def run_steps(
    step: Step, state: Float[Array, "K ..."], schedule: Schedule, progress: Progress, on_step: StepCallback
) -> Float[np.ndarray, "..."]:
    """The sample after every step of `schedule`; each is waited for, so that progress and timings are true."""
    total = len(schedule.timesteps)
    with progress.steps("denoise", total) as report:
        for done, (timestep, weights) in enumerate(zip(schedule.timesteps, schedule.weights), start=1):
            state = jax.block_until_ready(step(state, timestep, weights))
            report(done)
            on_step(done, total)
    return np.asarray(state[0])
