"""Floating-point operations of matrix products, by their shapes, and of kernels. Imports neither jax nor torch."""

from __future__ import annotations

import math
import re
from functools import cache

from tpuvid.plan.hlo import Computation, Instruction

MULTIPLIES = ("dot", "convolution")
"""Opcodes that `multiply_flops` counts."""


def kernel_flops(computation: Computation, kernel: Instruction) -> float | None:
    """What a Pallas kernel says of itself (`cost_estimate`); else those of softmax(QKᵀ)V, by the first three operands
    [heads, tokens, dim]; None where they don't look so."""
    if (own := kernel.attribute(r'"cost_estimate":\{"flops":"(\d+)"')) is not None:
        return float(own)
    arrays = [array for operand in computation.operands(kernel) for array in operand.outputs]
    arrays = [array for array in arrays if len(array.shape) >= 3 and re.fullmatch(r"bf16|f\d+.*", array.dtype)]
    if len(arrays) < 3:
        return None
    (*_, _, dim), (*_, keys, key_dim), (*_, values, value_dim) = (array.shape for array in arrays[:3])
    if dim != key_dim or keys != values:
        return None
    return 2 * math.prod(arrays[0].shape[:-1]) * keys * (dim + value_dim)


def multiply_flops(computation: Computation, instruction: Instruction) -> float:
    """2 × multiply-adds of a dot or a convolution."""
    out = instruction.outputs[0].shape
    left, right = (operand.outputs[0].shape for operand in computation.operands(instruction)[:2])
    if instruction.opcode == "dot":
        return 2 * math.prod(out) * math.prod(left[axis] for axis in instruction.dims("lhs_contracting_dims"))
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", instruction.attribute(r"dim_labels=([^\s,]+)") or "")
    if labels is None:
        raise ValueError(f"{instruction.name}: a convolution without labels of its dimensions")
    lhs, rhs, result = labels.groups()
    window = instruction.attribute(r"window=\{([^}]*)\}") or ""
    taps = 1
    for n, label in enumerate(sorted(set(result) - set("bf"))):
        taps *= _taps(out[result.index(label)], left[lhs.index(label)], right[rhs.index(label)], _window(window, n))
    batch = out[result.index("b")]
    return 2 * batch * out[result.index("f")] * right[rhs.index("i")] * taps


def _window(text: str, axis: int) -> tuple[int, int, int, int]:
    """Stride, padding before, dilation of the input, dilation of the kernel, along one spatial dimension."""
    fields = dict(part.split("=") for part in text.split())
    value = {name: entry.split("x")[axis] for name, entry in fields.items()}
    before = int(value.get("pad", "0_0").partition("_")[0])
    return int(value.get("stride", 1)), before, int(value.get("lhs_dilate", 1)), int(value.get("rhs_dilate", 1))


@cache
def _taps(out: int, size: int, kernel: int, window: tuple[int, int, int, int]) -> int:
    """Pairs of an output and a tap of the kernel that meet an element of the input."""
    stride, before, dilation, spread = window
    reach = (size - 1) * dilation
    if kernel == 1 and dilation == 1:  # each output takes one element or none
        first, last = -(-before // stride), (reach + before) // stride
        return max(0, min(out - 1, last) - max(0, first) + 1)
    count = 0
    for tap in range(kernel):
        places = range(tap * spread - before, tap * spread - before + out * stride, stride)
        count += sum(0 <= place <= reach and place % dilation == 0 for place in places)
    return count
