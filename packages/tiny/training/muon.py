"""Muon for weight matrices and convolutions, AdamW for the rest.

Muon (K. Jordan, 2024, https://kellerjordan.github.io/posts/muon/) replaces each matrix's momentum by the nearest
orthogonal matrix. A convolution counts as the matrix [out, in * kernel]. Weights of the same shape are stacked, so that
one batched Newton-Schulz iteration serves them all; `torch.optim.Muon` takes neither convolutions nor stacks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Coefficients of the quintic iteration, from the page above.
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrix of each of ``matrices`` [K, M, N], about."""
    a, b, c = QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()  # the iteration is robust to rounding, and twice as fast
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; the update's size is matched to AdamW's, so one learning rate serves both."""

    def __init__(self, weights: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(list(weights), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            stacks = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    stacks[weight.flatten(1).shape].append(weight)
            for (rows, columns), weights in stacks.items():
                updates = orthogonalise(torch.stack([self.momentum(weight, group["momentum"]) for weight in weights]))
                size = 0.2 * max(rows, columns) ** 0.5  # RMS 0.2 per entry, as AdamW's usually is
                for weight, update in zip(weights, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(update.view_as(weight).float(), alpha=-group["lr"] * size)

    def momentum(self, weight: nn.Parameter, beta: float) -> Tensor:
        """This step's Nesterov momentum of one weight, as a matrix."""
        state = self.state[weight]
        buffer = state.setdefault("momentum", torch.zeros_like(weight))
        buffer.lerp_(weight.grad, 1 - beta)
        return weight.grad.lerp(buffer, beta).reshape(weight.shape[0], -1)


class Optimisers:
    """Muon for the inner weights, AdamW for biases, gains, embeddings and the first and last layers."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], lr: float, adam_words: tuple[str, ...]):
        inner, outer = [], []
        for name, weight in named:
            is_matrix = weight.ndim >= 2 and min(weight.flatten(1).shape) > 1
            (inner if is_matrix and not any(word in name for word in adam_words) else outer).append(weight)
        self.lr = lr
        self.weights = inner + outer
        self.both = (
            Muon(inner, lr=lr),
            torch.optim.AdamW(outer, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=False),
        )

    def step(self, scale: float, clip: float = 1.0) -> float:
        """One update at ``scale`` times the learning rate; returns the gradient's norm and clears it."""
        norm = torch.nn.utils.clip_grad_norm_(self.weights, clip)
        for optimiser in self.both:
            for group in optimiser.param_groups:
                group["lr"] = self.lr * scale
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return float(norm)

    def state_dict(self) -> list[dict]:
        return [optimiser.state_dict() for optimiser in self.both]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimiser, state in zip(self.both, states, strict=True):
            optimiser.load_state_dict(state)


class Average:
    """Exponential moving average of a model's weights: what is exported."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.steps = decay, 0
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))  # short memory while the weights move fast
        for name, value in model.state_dict().items():
            self.weights[name].lerp_(value, 1 - decay)
