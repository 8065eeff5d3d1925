"""Stock torch modules as pure JAX functions.

`TracedModule` turns ``module.method`` into ``f(params, *args)`` for `jax.jit`; nothing is enabled globally and no torch
tensor is computed with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from torch.nn.utils import stateless
from torch.utils import _pytree as pytree

from tpuvid.compute.bridge import Params, tracing
from tpuvid.compute.lock import TRACING
from tpuvid.compute.outline import Config, Outline, code_of, config_of, words_of
from tpuvid.compute.scanned import Scan, ScannedBlocks, Tap
from tpuvid.files.kept import Entry, Kept


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """The module that `make` gives, in eval mode: parameters on the meta device (no memory), buffers real."""
    from accelerate import init_empty_weights

    with TRACING, init_empty_weights(include_buffers=False):  # which changes nn.Module for the process
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
        self._module: nn.Module | None = None
        self._stacks: dict[str, ScannedBlocks] = {}
        """The scanned stacks, by the prefix of their parameters' names."""
        self._key = [_name_of(self._make), key, repr(self._scan)]
        self._outlines = kept or Kept()
        self.outline = Outline.of_entry(self._outlines.get("outline", self._key, self._described))

    @property
    def module(self) -> nn.Module:
        """The module, built: parameters have no values."""
        with TRACING:  # and under no other lock, as `cached_property` would have it
            if self._module is None:
                module = self._make()
                for name, how in self._scan.items():
                    blocks = ScannedBlocks(getattr(module, name), how)
                    setattr(module, name, blocks)
                    blocks.fsdp = self._fsdp
                    self._stacks[f"{name}.layer."] = blocks
                self._module = module
            return self._module

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
        """The checkpoint names that each parameter may have: tied ones have several."""
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
        with TRACING:
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
            with tracing() as env:
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
