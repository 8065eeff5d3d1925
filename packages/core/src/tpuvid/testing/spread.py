"""Random weights that let a bug show."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def spread(module: nn.Module, *, wider: float = 1.0) -> None:
    """Random values in what initialises to zeros, ones or nearly nothing, and `wider` ones elsewhere."""
    import torch

    for parameter in module.parameters():
        if parameter.ndim == 1 or parameter.std() < 0.02 * wider:
            parameter.data += 0.1 * torch.randn_like(parameter)
        else:
            parameter.data *= wider
