"""torchax, set up for tracing, and what a module may call while it is traced. The only module of tpuvid that touches torchax.

Nothing is enabled globally and no torch tensor is computed with. While a module is traced, classes of torchax are other ones
for the whole process, and the module itself is changed: threads do it one after the other (`TRACING`).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import nn
from torch._ops import OpOverloadPacket, _OpNamespace

from tpuvid.compute import kernels, operators
from tpuvid.compute.kernels.placement import placement
from tpuvid.compute.kernels.tokens import Stream
from tpuvid.compute.lock import TRACING

Params = dict[str, jax.Array]


class _Missing:
    """Stands for an operator or overload that this torch lacks: a key of torchax's tables that nothing looks up."""

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, key: str) -> _Missing:
        if key.startswith("__"):
            raise AttributeError(key)
        return _Missing(f"{self.name}.{key}")

    def __repr__(self) -> str:
        return f"<{self.name}, which torch {torch.__version__} lacks>"


@contextmanager
def _missing_operators_skipped() -> Iterator[None]:
    """Within it, torchax can be imported: of the operators that 0.0.13 asks for, those that torch has removed are skipped.

    So far these are the overloads for named tensors (2.13), `aten.cholesky` and `aten.qr` (2.14); no model calls them. Whoever
    else asks for an operator still gets an `AttributeError`: torch probes for some.
    """
    stock = {kind: kind.__getattr__ for kind in (_OpNamespace, OpOverloadPacket)}

    def skipping(kind: type) -> Callable[[Any, str], Any]:
        def lookup(owner: Any, key: str) -> Any:
            try:
                return stock[kind](owner, key)
            except AttributeError:
                name = f"{owner.name if kind is _OpNamespace else owner}.{key}"
                asks = sys._getframe(1).f_globals.get("__name__", "")
                if key.startswith("__") or not name.startswith("aten.") or asks.partition(".")[0] != "torchax":
                    raise
                return _Missing(name)

        return lookup

    for kind in stock:
        kind.__getattr__ = skipping(kind)
    try:
        yield
    finally:
        for kind, lookup in stock.items():
            kind.__getattr__ = lookup


@cache
def environment() -> Any:
    """Our own torchax environment, with our attention and the few operators that torchax gets wrong or slow."""
    with _missing_operators_skipped():
        from torchax.tensor import Environment

        env = Environment()

    def on_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
        def operator(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = env.t2j_iso((args, kwargs))
            return env.j2t_iso(function(*args, **kwargs))

        return operator

    for name in operators.NAMES:
        env.override_op_definition(getattr(nn.functional, name), on_arrays(getattr(operators, name)))
    return env


class _Trees:
    """What torchax needs of `torch.utils._pytree`, by JAX's trees, which are compiled: torch's own take a third of a trace."""

    tree_flatten, tree_map = staticmethod(jax.tree.flatten), staticmethod(jax.tree.map)

    @staticmethod
    def tree_map_only(kind: type, function: Callable[[Any], Any], tree: Any) -> Any:
        return jax.tree.map(lambda leaf: function(leaf) if isinstance(leaf, kind) else leaf, tree)


@contextmanager
def tracing() -> Iterator[Any]:
    """The environment, entered, for as long as a module is traced."""
    with TRACING, _patched(environment()) as env, env, torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Explicitly requested dtype int64")  # torch's index type; int32 will do
        yield env


@contextmanager
def _patched(env: Any) -> Iterator[Any]:
    """Within it, torchax's tensors cast, and write slices, as torch's do."""
    from torchax import tensor as tensors
    from torchax.tensor import Tensor
    from torchax.view import NarrowInfo

    stock = Tensor.type_as, Tensor.__setitem__, NarrowInfo.update_tensor, tensors.torch_pytree

    def set_item(tensor: Any, key: Any, value: Any) -> None:
        ranges = _ranges(key, tensor._elem.shape)
        if ranges is None:
            stock[1](tensor, key, value)
        else:
            tensor._elem = _write_slice(tensor._elem, ranges, env.t2j_iso(value))

    def update_tensor(view: Any, value: jax.Array, array: jax.Array) -> jax.Array:
        ranges = _ranges(view.slices, array.shape)
        return stock[2](view, value, array) if ranges is None else _write_slice(array, ranges, value)

    # torchax's own type_as casts in place and leaves a stale dtype behind, which convolutions then refuse
    Tensor.type_as = lambda tensor, other: tensor.to(other.dtype)
    Tensor.__setitem__, NarrowInfo.update_tensor, tensors.torch_pytree = set_item, update_tensor, _Trees
    try:
        yield env
    finally:
        Tensor.type_as, Tensor.__setitem__, NarrowInfo.update_tensor, tensors.torch_pytree = stock


def _ranges(key: Any, shape: tuple[int, ...]) -> list[slice] | None:
    """`key` as one forward slice per dimension of `shape`; None if it holds anything but such slices."""
    parts = list(key) if isinstance(key, tuple) else [key]
    if parts.count(Ellipsis) == 1:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (len(shape) - len(parts) + 1)
    if not all(isinstance(part, slice) and (part.step is None or part.step > 0) for part in parts):
        return None
    return [slice(*part.indices(size)) for part, size in zip(parts, shape, strict=False)]


def _write_slice(array: jax.Array, ranges: list[slice], value: Any) -> jax.Array:
    """`array` with `value` at `ranges`, put together from parts. torchax writes it as a scatter, which XLA's CPU backend
    (jaxlib 0.10.2) does in place: attention with a rotary embedding at batch 1 then reads what is already overwritten."""
    value = jnp.broadcast_to(value, array[tuple(ranges)].shape).astype(array.dtype)
    for axis in reversed(range(len(ranges))):
        outer, here = tuple(ranges[:axis]), ranges[axis]
        if here.step == 1:
            parts = array[*outer, : here.start], value, array[*outer, here.stop :]
            value = jnp.concatenate([part for part in parts if part.shape[axis]], axis)
        else:
            old = array[tuple(outer)]
            spread = jnp.repeat(value, here.step, axis)  # entry i stands at i·step, where start moves it to its place
            after = max(0, old.shape[axis] - here.start - spread.shape[axis])
            pads = [(0, 0)] * old.ndim
            pads[axis] = (here.start, after)
            spread = jax.lax.slice_in_dim(jnp.pad(spread, pads), 0, old.shape[axis], axis=axis)
            place = jax.lax.broadcasted_iota(jnp.int32, old.shape, axis)
            chosen = (place >= here.start) & (place < here.stop) & ((place - here.start) % here.step == 0)
            value = jnp.where(chosen, spread, old)
    return value


def rotate_heads(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Within a traced module, `kernels.rotate_heads`: [B, T, C] and tables [T, D] → [B, N, T, D]."""
    env = environment()
    return env.j2t_iso(kernels.rotate_heads(*env.t2j_iso((x, cosines, sines))))


def token_attention(
    *streams: tuple[str, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], scale: float | None = None
) -> list[torch.Tensor]:
    """In a traced block, `kernels.tokens.token_attention` of streams (name, query, key, value [B, N, T, D], mask)."""
    env = environment()
    out = kernels.token_attention([Stream(name, *env.t2j_iso(tensors)) for name, *tensors in streams], scale=scale)
    return env.j2t_iso(out)


def map_rows(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """Within a traced module, ``torch.stack([function(*row) for row in zip(*tensors)])`` as a loop of the compiled program."""
    env = environment()
    rows = tuple(tensor.jax() for tensor in tensors)
    return env.j2t_iso(jax.lax.map(lambda row: function(*env.j2t_iso(row)).jax(), rows))


def scan_rows(
    function: Callable[..., tuple[torch.Tensor, torch.Tensor]], carry: torch.Tensor, *tensors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Within a traced module, ``carry, out = function(carry, *row)`` for row after row of `tensors`, as a loop of the compiled
    program: the last `carry` and all `out`, stacked."""
    env = environment()

    def step(carry: jax.Array, row: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        return env.t2j_iso(function(*env.j2t_iso((carry, *row))))

    return env.j2t_iso(jax.lax.scan(step, *env.t2j_iso((carry, tensors))))


def in_strips() -> bool:
    """Within a traced module, whether frames are in strips over devices."""
    return placement().spatial is not None


def group_statistics(x: torch.Tensor, norm: nn.GroupNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """Within a traced module, what `norm` takes away from `x` [B, C, …] and multiplies it by: [B, groups], float32."""
    env = environment()
    return env.j2t_iso(operators.group_statistics(env.t2j_iso(x), norm.num_groups, norm.eps))
