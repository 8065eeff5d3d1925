"""`CogVideoXDPMScheduler` as `tpuvid.family.tabulate` wants a scheduler. Its own ``step`` is stochastic and leaves it to the
caller to remember the last prediction and timestep."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogVideoXDPMScheduler
from torch import Tensor
from torch.overrides import TorchFunctionMode

DRAWS = 2
"""Normal tensors that one step draws at most; a second-order step throws its first one away."""


class Draws(TorchFunctionMode):
    """Within it, `torch.randn` (what diffusers' `randn_tensor` calls) gives `tensors` one by one."""

    def __init__(self, tensors: list[Tensor]):
        super().__init__()
        self.tensors, self.taken = tensors, 0

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        if function is not torch.randn:
            return function(*args, **(kwargs or {}))
        self.taken += 1
        return self.tensors[self.taken - 1]


class DPMSteps:
    """The scheduler with its memory in it. `draws` are the next step's normal tensors: memories that the host fills.

    They sort before the prediction that it remembers, so they are the first `DRAWS` memories of the table.
    """

    def __init__(self, scheduler: CogVideoXDPMScheduler):
        self._scheduler = scheduler
        self.config, self.alphas_cumprod = scheduler.config, scheduler.alphas_cumprod

    def set_timesteps(self, num_inference_steps: int) -> None:
        self._scheduler.set_timesteps(num_inference_steps)
        self.timesteps = self._scheduler.timesteps
        self.draws = [torch.zeros(1, 1, 1, 1, dtype=torch.float64) for _ in range(DRAWS)]
        self.prediction: Tensor | None = None
        self.last_timestep: Tensor | None = None
        self.taken: list[int] = []
        """How many of `draws` each step so far has used."""

    def step(self, output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        with Draws(self.draws) as draws:
            sample, self.prediction = self._scheduler.step(
                output, self.prediction, timestep, self.last_timestep, sample, return_dict=return_dict
            )
        self.last_timestep = timestep
        self.taken.append(draws.taken)
        return (sample,)
