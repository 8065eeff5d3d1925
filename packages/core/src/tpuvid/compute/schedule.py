"""A stock diffusers scheduler as a table: one matrix per step, taken from the scheduler itself.

The deterministic samplers in use (flow-match Euler, UniPC, DPM++, DDIM) are linear: the next sample, and whatever a
multistep method remembers, are weighted sums of the sample, the model's output and what was remembered. So running
``scheduler.step`` once on basis vectors yields the weights of every step, in float64, with nothing re-implemented; the
denoising loop is then the same compiled step for all of them, with no host arithmetic on latents.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from jaxtyping import Float

from tpuvid.files.kept import Entry, Kept


@dataclass(frozen=True)
class Schedule:
    timesteps: Float[np.ndarray, " steps"]
    """What the model is told at each step."""
    weights: Float[np.ndarray, "steps K K+1"]
    """Rows: next sample, then K−1 memories. Columns: sample, memories, model output."""
    draws: tuple[int, ...] = ()
    """How many normal tensors each step of a stochastic scheduler draws; the host puts them into the first memories."""
    denoised: Float[np.ndarray, "steps 2"] | None = None
    """Weights of sample and model output in what the model takes the denoised sample for; None: not known."""
    made_by: str = ""
    """The Python module of the scheduler's class."""

    @property
    def memories(self) -> int:
        return self.weights.shape[1] - 1

    @classmethod
    def kept(cls, kept: Kept, key: Any, make: Callable[[], Schedule]) -> Schedule:
        """What `make` gives, or an earlier process had from it under `key` (JSON-ready: all that it depends on)."""

        def entry() -> Entry:
            made = make()
            arrays = {"timesteps": made.timesteps, "weights": made.weights}
            arrays |= {} if made.denoised is None else {"denoised": made.denoised}
            about = {"draws": list(made.draws), "made_by": made.made_by}
            return Entry(arrays, about, [sys.modules[made.made_by]] if made.made_by else [])

        found = kept.get("schedule", key, entry)
        return cls(**found.arrays, draws=tuple(found.about["draws"]), made_by=found.about["made_by"])


def advance(
    weights: Float[Array, "K K+1"], state: Float[Array, "K ..."], output: Float[Array, " ..."]
) -> Float[Array, "K ..."]:
    """One scheduler step on ``state`` = [sample, memories…], all float32."""
    known = jnp.concatenate([state, output.astype(jnp.float32)[None]])
    return jnp.einsum("ij,j...->i...", weights, known, precision="highest")


def tabulate(scheduler: Any, num_inference_steps: int, **timesteps: Any) -> Schedule:
    """The `Schedule` of a diffusers scheduler; `timesteps` are what a pipeline tells its ``set_timesteps`` instead of the
    number of steps ("sigmas", "mu"). Raises `ValueError` if it is not linear and deterministic, or can't make so many."""
    try:
        return _tabulate(scheduler, num_inference_steps, timesteps or {"num_inference_steps": num_inference_steps})
    except (AssertionError, IndexError) as error:  # UniPC takes two steps that are rounded to one timestep for one
        raise ValueError(f"{type(scheduler).__name__} can't make {num_inference_steps} steps; use fewer of them") from error


def _tabulate(scheduler: Any, num_inference_steps: int, timesteps: dict[str, Any]) -> Schedule:
    scheduler.set_timesteps(**timesteps)
    if len(scheduler.timesteps) != num_inference_steps:
        raise ValueError(f"{type(scheduler).__name__} evaluates the model more than once per step; it is not supported")
    slots = _count_memories(scheduler, num_inference_steps)
    scheduler.set_timesteps(**timesteps)
    size = slots + 2  # sample, memories, model output
    generator = torch.Generator().manual_seed(0)
    rows = []
    denoised = [_denoised(scheduler, step) for step in range(num_inference_steps)]
    for timestep in scheduler.timesteps:
        # one batch entry per basis vector, and random mixtures of all, small and large, that show whether the step is linear
        mixtures = torch.randn(2, size, generator=generator, dtype=torch.float64) * torch.tensor([[1.0], [1000.0]])
        inputs = torch.cat([torch.eye(size, dtype=torch.float64), mixtures]).reshape(size + 2, size, 1, 1, 1)
        for slot, (owner, key) in enumerate(_memory_places(scheduler), start=1):
            owner[key] = inputs[:, slot]
        sample = scheduler.step(inputs[:, -1], timestep, inputs[:, 0], return_dict=False)[0]
        kept = [owner[key] for owner, key in _memory_places(scheduler)]
        kept += [torch.zeros_like(sample)] * (slots - len(kept))  # a multistep method fills its memories as it goes
        outputs = torch.stack([sample, *kept], dim=1).reshape(size + 2, slots + 1)
        matrix, mixed = outputs[:size].T, outputs[size:]
        if not torch.isfinite(outputs).all():
            raise ValueError(f"{type(scheduler).__name__} gives infinite or undefined samples with this configuration")
        if not torch.allclose(mixtures @ matrix.T, mixed, rtol=1e-4, atol=1e-5 * mixtures.abs().max().item()):
            raise ValueError(f"{type(scheduler).__name__} is not linear with this configuration; it is not supported")
        rows.append(matrix.numpy())
    return Schedule(
        scheduler.timesteps.double().numpy().astype(np.float32),
        np.stack(rows).astype(np.float32),
        denoised=None if None in denoised else np.array(denoised, np.float32),
        made_by=type(scheduler).__module__,
    )


def estimate(
    schedule: Schedule, step: int, before: Float[np.ndarray, "K ..."], after: Float[np.ndarray, "K ..."]
) -> Float[np.ndarray, " ..."]:
    """The denoised sample as the model saw it at `step`, from the state before it (draws included) and after it.

    A step is linear, so the model's output follows from the two. The sample itself where that can't be had.
    """
    weights = schedule.weights[step, 0]
    if schedule.denoised is None or step + 1 == len(schedule.timesteps) or abs(weights[-1]) < 1e-6:
        return after[0]
    output = (after[0] - np.tensordot(weights[:-1], before, axes=1)) / weights[-1]
    of_sample, of_output = schedule.denoised[step]
    return of_sample * before[0] + of_output * output


def _denoised(scheduler: Any, step: int) -> tuple[float, float] | None:
    """The weights of sample and model output, by what the model predicts; flow matching: x₀ = x − σ v (arXiv:2210.02747)."""
    kind = getattr(scheduler, "config", {}).get("prediction_type", "flow_prediction")
    sigmas = getattr(scheduler, "sigmas", None)
    if kind == "flow_prediction" and sigmas is not None:
        return 1.0, -float(sigmas[step])
    if kind == "v_prediction" and sigmas is None:  # arXiv:2202.00512
        alpha = float(scheduler.alphas_cumprod[int(scheduler.timesteps[step])])
        return alpha**0.5, -((1 - alpha) ** 0.5)
    return None


def _memory_places(scheduler: Any) -> list[tuple[Any, Any]]:
    """Where a scheduler keeps tensors like the sample: attributes, and entries of lists, in a fixed order."""
    places = []
    for name, value in sorted(vars(scheduler).items()):
        if isinstance(value, torch.Tensor) and value.ndim == 4:
            places.append((vars(scheduler), name))
        elif isinstance(value, list):
            places += [(value, i) for i, item in enumerate(value) if isinstance(item, torch.Tensor) and item.ndim == 4]
    return places


def _count_memories(scheduler: Any, steps: int) -> int:
    """The most tensors that it remembers at any time."""
    sample, most = torch.zeros(1, 1, 1, 1, dtype=torch.float64), 0
    for timestep in scheduler.timesteps:
        sample = scheduler.step(sample, timestep, sample, return_dict=False)[0]
        most = max(most, len(_memory_places(scheduler)))
    return most
