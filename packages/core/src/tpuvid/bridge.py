"""Stock torch modules as pure JAX functions. The only module of tpuvid that touches torchax.

`TracedModule` turns ``module.method`` into ``f(params, *args)`` for `jax.jit`; nothing is enabled globally and no torch
tensor is computed with. A stack of identical blocks runs as one `jax.lax.scan` over their stacked weights, so that the
compiler sees one block: Wan 2.1 14B at 720p compiles for a v6e-8 in 23 s instead of 184 s, with the same numbers.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Mesh, PartitionSpec
from torch import nn
from torch._ops import OpOverloadPacket, _OpNamespace
from torch.nn.utils import stateless
from torch.utils import _pytree as pytree

from tpuvid import kernels, operators
from tpuvid.kept import Entry, Kept
from tpuvid.kernels.placement import TokenSplit, placement, tokens_split
from tpuvid.kernels.tokens import Stream, padded_length
from tpuvid.mesh import FSDP, fsdp_axis, fsdp_spec
from tpuvid.outline import Config, Outline, code_of, config_of, words_of

Params = dict[str, jax.Array]
Carry = tuple[jax.Array, ...]
"""What passes from block to block of a scanned stack."""
State = tuple[Carry, Carry | None]
"""And what entered the last block that has run, where a tap asks for it."""


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


@contextmanager
def _tracing() -> Iterator[Any]:
    """The environment, entered, for as long as a module is traced."""
    env = environment()
    from torchax.tensor import Tensor
    from torchax.view import NarrowInfo

    stock = Tensor.type_as, Tensor.__setitem__, NarrowInfo.update_tensor

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
    Tensor.__setitem__, NarrowInfo.update_tensor = set_item, update_tensor
    try:
        with env, torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Explicitly requested dtype int64")  # torch's index type; int32 will do
            yield env
    finally:
        Tensor.type_as, Tensor.__setitem__, NarrowInfo.update_tensor = stock


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


@dataclass
class Tap:
    """What enters the last block of a scanned stack: None until a trace has set it."""

    value: tuple[jax.Array, ...] | None = None


class Scan(NamedTuple):
    """How a list of identical blocks runs as one `jax.lax.scan`."""

    carries: int
    """The first so many arguments of a block's forward are what it returns, and pass from block to block; the others are the
    same for every block."""
    tokens: Mapping[str, int] = {}
    """The arguments (arrays, or trees of them) that hold tokens, and along which axis. Where the mesh splits tokens, each
    device gets its part of these, padded; a block must then let tokens meet in `token_attention` only."""
    per_block: tuple[str, ...] = ()
    """The arguments of which each block has its own: what the model passes on has blocks as its first axis, [depth, B, …]."""


class ScannedBlocks(nn.Module):
    """A list of identical blocks that runs as one `jax.lax.scan`; a model's own ``for block in self.blocks`` sees one block.

    Parameters are named like one block's and have a leading block axis.
    """

    def __init__(self, blocks: nn.ModuleList, scan: Scan):
        super().__init__()
        self.carries, self.tokens, self.per_block = scan
        self.depth = len(blocks)
        self.layer = blocks[0]
        self.tap: Tap | None = None
        self.fsdp = False
        self._names = list(inspect.signature(type(self.layer).forward).parameters)[1:]
        for name, parameter in list(self.layer.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            stacked = torch.empty((self.depth, *parameter.shape), dtype=parameter.dtype, device="meta")
            setattr(self.layer.get_submodule(owner), leaf, nn.Parameter(stacked, requires_grad=False))

    def __iter__(self) -> Iterator[nn.Module]:
        yield self

    def __len__(self) -> int:
        return 1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        env = environment()
        shared = env.t2j_iso(dict(zip(self._names, args, strict=False)) | kwargs)
        stacked = {name: p.jax() for name, p in self.layer.named_parameters()}
        carry = tuple(shared.pop(name) for name in self._names[: self.carries])
        mesh = placement().mesh
        if self.tokens and mesh is not None and mesh.shape.get("sp", 1) > 1:
            carry = self._run_split(carry, shared, stacked, mesh)
        else:
            carry, entered = self._run(self._start(carry), shared, stacked)
            self._keep(entered)
        out = env.j2t_iso(carry)
        return out if self.carries > 1 else out[0]

    def map(self, function: Callable[[nn.Module], torch.Tensor]) -> torch.Tensor:
        """[depth, …]: what `function` makes of each block."""
        env = environment()

        def one(weights: Params) -> jax.Array:
            with stateless._reparametrize_module(self.layer, env.j2t_iso(weights)):
                return function(self.layer).jax()

        return env.j2t_iso(jax.lax.map(one, {name: p.jax() for name, p in self.layer.named_parameters()}))

    def _start(self, carry: Carry) -> Carry:
        """What the first block that runs gets: all run on `carry`, or, on what a tap has kept, the last one alone."""
        return carry if self.tap is None or self.tap.value is None else self.tap.value

    def _keep(self, entered: Carry | None) -> None:
        if entered is not None:
            assert self.tap is not None, "only a tap has `_run` give what enters the last block"
            self.tap.value = entered

    def _run_split(self, carry: Carry, shared: dict[str, Any], stacked: Params, mesh: Mesh) -> Carry:
        """What leaves the last block, each device having worked on its part of the tokens."""
        names = self._names[: self.carries]
        inputs = dict(zip(names, carry, strict=True)) | shared
        parts, batch = mesh.shape["sp"], len(carry[0])
        dp = "dp" if batch % mesh.shape["dp"] == 0 else None
        lengths = {name: jax.tree.leaves(inputs[name])[0].shape[axis] for name, axis in self.tokens.items()}

        def spec(name: str, leaf: jax.Array) -> PartitionSpec:
            axes: list[str | None] = [None] * leaf.ndim
            first = int(name in self.per_block)
            if leaf.ndim > first and leaf.shape[first] == batch:
                axes[first] = dp
            if name in self.tokens:
                axes[self.tokens[name]] = "sp"
            return PartitionSpec(*axes)

        def pad(name: str, leaf: jax.Array) -> jax.Array:
            pads = [(0, 0)] * leaf.ndim
            axis = self.tokens[name]
            pads[axis] = (0, padded_length(leaf.shape[axis], parts) - leaf.shape[axis])
            return jnp.pad(leaf, pads)

        inputs |= {name: jax.tree.map(partial(pad, name), inputs[name]) for name in self.tokens}
        specs = {name: jax.tree.map(partial(spec, name), value) for name, value in inputs.items()}
        carry, carry_specs = (tuple(tree.pop(name) for name in names) for tree in (inputs, specs))

        def one_part(carry: Carry, shared: dict[str, Any], stacked: Params) -> State:
            with tokens_split(TokenSplit(parts, lengths)):
                return self._run(carry, shared, stacked)

        taps = self.tap is not None and self.tap.value is None
        weights = {name: fsdp_spec(w.shape, mesh) if self.fsdp else PartitionSpec() for name, w in stacked.items()}
        run = jax.shard_map(
            one_part,
            mesh=mesh,
            in_specs=(carry_specs, specs, weights),
            out_specs=(carry_specs, carry_specs if taps else None),
            check_vma=False,
        )
        carry, entered = run(self._start(carry), inputs, stacked)
        self._keep(entered)
        return tuple(jax.lax.slice_in_dim(c, 0, lengths[n], axis=self.tokens[n]) for n, c in zip(names, carry, strict=True))

    def _run(self, carry: Carry, shared: dict[str, Any], stacked: Params) -> State:
        """What leaves the last block and, for a tap that has nothing yet, what enters it."""
        if self.tap is not None and self.tap.value is not None:
            return self._last_block(carry, shared, stacked), None
        tapped = self.tap is not None

        own = {name: shared[name] for name in self.per_block}

        def step(state: State, weights: Params, own: dict[str, Any]) -> State:
            carry, _ = state
            return self._block(carry, shared | own, weights), carry if tapped else None

        state: State = (carry, carry if tapped else None)
        if not self._gathers():
            return jax.lax.scan(lambda state, block: (step(state, *block), None), state, (stacked, own))[0]

        def step_and_gather(both: tuple[State, Params], block: tuple[Any, dict[str, Any]]) -> tuple[tuple[State, Params], None]:
            (state, weights), (number, own) = both, block
            upcoming = self._gather(stacked, jnp.minimum(number + 1, self.depth - 1))  # beside the step, which doesn't need it
            return (step(state, weights, own), upcoming), None

        return jax.lax.scan(step_and_gather, (state, self._gather(stacked, 0)), (jnp.arange(self.depth), own))[0][0]

    def _last_block(self, carry: Carry, shared: dict[str, Any], stacked: Params) -> Carry:
        last = self.depth - 1
        weights = self._gather(stacked, last) if self._gathers() else {name: w[last] for name, w in stacked.items()}
        own = {name: jax.tree.map(lambda x: x[last], shared[name]) for name in self.per_block}
        return self._block(carry, shared | own, weights)

    def _block(self, carry: Carry, shared: dict[str, Any], weights: Params) -> Carry:
        env = environment()
        with stateless._reparametrize_module(self.layer, env.j2t_iso(weights)):
            out = self.layer(**env.j2t_iso(dict(zip(self._names, carry, strict=False)) | shared))
        out = out if isinstance(out, tuple) else (out,)
        return tuple(o.jax().astype(c.dtype) for o, c in zip(out, carry, strict=True))

    def _gathers(self) -> bool:
        return self.fsdp and placement().tokens is not None

    def _gather(self, stacked: Params, block: Any) -> Params:
        """One block's weights, of which each device has a part."""
        mesh = placement().mesh
        assert mesh is not None, "tokens are split over a mesh"
        shapes = {name: parameter.shape[1:] for name, parameter in self.layer.named_parameters()}

        def whole(name: str, part: jax.Array) -> jax.Array:
            axis = fsdp_axis(shapes[name], mesh)
            part = jax.lax.dynamic_index_in_dim(part, block, keepdims=False)
            return part if axis is None else jax.lax.all_gather(part, FSDP, axis=axis, tiled=True)

        return {name: whole(name, part) for name, part in stacked.items()}


def rotate_heads(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Within a traced module, `tpuvid.kernels.rotate_heads`: [B, T, C] and tables [T, D] → [B, N, T, D]."""
    env = environment()
    return env.j2t_iso(kernels.rotate_heads(*env.t2j_iso((x, cosines, sines))))


def token_attention(
    *streams: tuple[str, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], scale: float | None = None
) -> list[torch.Tensor]:
    """In a traced block, `tpuvid.kernels.tokens.token_attention` of streams (name, query, key, value [B, N, T, D], mask)."""
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


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """The module that `make` gives, in eval mode: parameters on the meta device (no memory), buffers real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        module = make()
    if hasattr(module, "tie_weights"):  # moving each parameter has undone transformers' own ties
        module.tie_weights()
    return module.eval().requires_grad_(False)


class TracedModule:
    """A stock module, its parameter names as a checkpoint has them, and its methods as pure functions.

    Parameter names have ``*`` for the block number of a scanned stack: ``blocks.*.attn1.to_q.weight`` [depth, out, in].
    """

    def __init__(
        self,
        module: nn.Module | Callable[[], nn.Module],
        *,
        scan: Mapping[str, Scan] | None = None,
        keep_in_fp32: tuple[str, ...] = (),
        kept: Kept | None = None,
        key: Any = None,
    ):
        """`scan` says which lists of blocks, by name, run as one scan. `keep_in_fp32`: parts of parameter names that stay
        float32 whatever the dtype of the others; a module may also name them in its `facts`, as "keep_in_fp32".

        A function in the place of `module` is called when the module is first needed. Where an earlier process has `kept` its
        outline under `key` (JSON-ready: all that the function depends on), that is when something has to be traced.
        """
        self._make = (lambda: module) if isinstance(module, nn.Module) else module
        self._scan, self._keep_in_fp32, self._fsdp = dict(scan or {}), keep_in_fp32, False
        self._stacks: dict[str, ScannedBlocks] = {}
        """By the prefix of their parameters' names."""
        self._key = [_name_of(self._make), key, repr(self._scan)]
        self._outlines = kept or Kept()
        self.outline = Outline.of_entry(self._outlines.get("outline", self._key, self._described))

    @cached_property
    def module(self) -> nn.Module:
        """The module, built: parameters have no values."""
        module = self._make()
        for name, how in self._scan.items():
            blocks = ScannedBlocks(getattr(module, name), how)
            setattr(module, name, blocks)
            blocks.fsdp = self._fsdp
            self._stacks[f"{name}.layer."] = blocks
        return module

    def _described(self) -> Entry:
        module = self.module
        shared: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            shared.setdefault(id(parameter), []).append(self._public(name))
        outline = Outline(
            parameters={self._public(name): tuple(parameter.shape) for name, parameter in module.named_parameters()},
            sources={group[0]: group for group in shared.values()},
            depths={prefix.replace(".layer.", ".*."): stack.depth for prefix, stack in self._stacks.items()},
            splits_tokens=bool(self._stacks) and all(stack.tokens for stack in self._stacks.values()),
            buffers={name: buffer.numpy() for name, buffer in module.named_buffers()},
            config=config_of(module),
            facts=Config(getattr(module, "facts", {})),
            words=words_of(module),
        )
        return outline.entry(code_of(module))

    @property
    def config(self) -> Config:
        """The module's config, with its class's defaults filled in."""
        return self.outline.config

    @property
    def facts(self) -> Config:
        """What the module says of itself."""
        return self.outline.facts

    @property
    def splits_tokens(self) -> bool:
        """Whether its blocks can have their tokens split over devices."""
        return self.outline.splits_tokens

    @property
    def fsdp(self) -> bool:
        """Whether the weights of blocks are split over the devices that split tokens, and gathered block by block."""
        return self._fsdp

    @fsdp.setter
    def fsdp(self, value: bool) -> None:
        self._fsdp = value and bool(self._scan)
        for stack in self._stacks.values():
            stack.fsdp = self._fsdp

    def parameters(self, dtype: np.dtype) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every parameter, by checkpoint name; tied parameters once."""
        in_fp32 = {*self._keep_in_fp32, *self.facts.get("keep_in_fp32", ())}
        return {
            name: jax.ShapeDtypeStruct(shape, np.float32 if in_fp32 & set(name.split(".")) else dtype)
            for name, shape in self.outline.parameters.items()
        }

    def sources(self) -> Mapping[str, list[str]]:
        """For every parameter, the checkpoint names it may have: tied ones have several."""
        return self.outline.sources

    def depth(self, name: str) -> int:
        """How many blocks the stacked parameter `name` has."""
        return next(depth for prefix, depth in self.outline.depths.items() if name.startswith(prefix))

    @contextmanager
    def tapped(self, kept: tuple[jax.Array, ...] | None = None) -> Iterator[Tap]:
        """Within it, functions run all blocks of the scanned stack and the tap gets what enters the last one; where `kept`
        is such a value, they run only the last block, on it, and XLA drops all that served the others.

        Raises `ValueError` for a module that has not exactly one scanned stack.
        """
        module = self.module
        if len(self._stacks) != 1:
            raise ValueError(f"{type(module).__name__} has {len(self._stacks)} scanned stacks of blocks, not one")
        (stack,) = self._stacks.values()
        stack.tap = Tap(kept)
        try:
            yield stack.tap
        finally:
            stack.tap = None

    def buffers(self) -> Params:
        """The module's buffers (RoPE tables and the like), computed by its own constructor."""
        return {name: jnp.asarray(buffer) for name, buffer in self.outline.buffers.items()}

    def function(self, method: str = "forward", **static: Any) -> Callable[..., Any]:
        """``f(params, *args, **kwargs)`` over jax arrays; `method` may be dotted ("decoder.forward"). `static` are fixed.

        Results are trees of arrays; strings and None in them pass through.
        """

        def pure(params: Mapping[str, jax.Array], *args: Any, **kwargs: Any) -> Any:
            owner_name, _, name = method.rpartition(".")
            owner = self.module.get_submodule(owner_name)
            swapped = {self._private(k): v for k, v in params.items()}
            with _tracing() as env:
                swapped, args, kwargs = env.j2t_iso((swapped, args, kwargs))
                with stateless._reparametrize_module(self.module, swapped, tie_weights=True):
                    out = getattr(type(owner), name)(owner, *args, **kwargs, **static)
            return pytree.tree_map_only(torch.Tensor, lambda t: t.jax(), out)

        return pure

    def _public(self, name: str) -> str:
        for prefix in self._stacks:
            if name.startswith(prefix):
                return prefix.replace(".layer.", ".*.") + name.removeprefix(prefix)
        return name

    def _private(self, name: str) -> str:
        return name.replace(".*.", ".layer.")


def _name_of(make: Callable[..., Any]) -> str:
    """A function's name, with the class of whom it is a method of."""
    owner = getattr(make, "__self__", None)
    named: list[Any] = [make] if owner is None else [make, type(owner)]
    return " of ".join(f"{x.__module__}:{x.__qualname__}" for x in named)
