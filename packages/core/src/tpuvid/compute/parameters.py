"""Checkpoint tensors → device arrays, shard by shard: host memory never holds a second full copy."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from tpuvid.compute.bridge import Params
from tpuvid.compute.mesh import Rule, shard_parameters
from tpuvid.compute.traced import TracedModule
from tpuvid.errors import InputError
from tpuvid.files.weights import UnseenWeights, Weights


def match_parameters(traced: TracedModule, weights: Weights, *, ignore: Sequence[str] = ()) -> dict[str, list[str]]:
    """The checkpoint's tensors of each parameter of `traced`: of each block, where it is stacked.

    `ignore` are prefixes of checkpoint names that this stage has no use for. Raises `InputError` naming the tensors
    where the checkpoint and the module don't match: all must be found with their shapes, none may be left over.
    """
    if isinstance(weights, UnseenWeights):
        return {}
    structs = traced.parameters(np.dtype(np.float32))
    sources, missing = {}, []
    for name, aliases in traced.sources().items():
        candidates = [_members(traced, alias) for alias in aliases]
        found = next((members for members in candidates if all(m in weights for m in members)), None)
        if found is None:
            missing += [m for m in candidates[0] if m not in weights]
            continue
        sources[name] = found
        shape = structs[name].shape[1:] if "*" in name else structs[name].shape
        if wrong := next((m for m in found if weights[m] != shape), None):
            raise InputError(
                f"{weights.folder}: {wrong} has shape {weights[wrong]}, config.json asks for {shape}; "
                "download the component again"
            )
    known = {m for aliases in traced.sources().values() for alias in aliases for m in _members(traced, alias)}
    unexpected = [name for name in weights if name not in known and not name.startswith(tuple(ignore))]
    if missing or unexpected:
        problems = f"{_list('missing', missing)}{_list('left over', unexpected)}"
        raise InputError(f"{weights.folder}: weights don't match config.json: {problems}download the component again")
    return sources


def load_parameters(
    traced: TracedModule,
    weights: Weights,
    *,
    mesh: Mesh,
    rules: Sequence[Rule] = (),
    dtype: np.dtype,
    ignore: Sequence[str] = (),
) -> Params:
    """Every parameter of `traced`, laid out on `mesh` by `rules` and cast to `dtype` (or float32 where it keeps that).

    Raises `InputError` as `match_parameters` does.
    """
    structs = traced.parameters(dtype)
    shardings = shard_parameters(structs, rules, mesh, fsdp=traced.fsdp)
    if isinstance(weights, UnseenWeights):
        return {name: weights.place(struct, shardings[name]) for name, struct in structs.items()}
    sources = match_parameters(traced, weights, ignore=ignore)

    def load(name: str) -> jax.Array:
        struct, members = structs[name], sources[name]

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None, "every device has a part"
            if "*" not in name:
                return weights.read(members[0], index).astype(struct.dtype)
            layers, index = members[index[0]], index[1:]
            shape = [len(range(*part.indices(size))) for part, size in zip(index, struct.shape[1:], strict=True)]
            stacked = np.empty((len(layers), *shape), struct.dtype)
            for layer, member in zip(stacked, layers, strict=True):  # filled one by one: a list of them would be a second copy
                layer[...] = weights.read(member, index)
            return stacked

        # waited for, so that the host's side of a transfer is freed before the next parameter is read
        return jax.block_until_ready(jax.make_array_from_callback(struct.shape, shardings[name], shard))

    return {name: load(name) for name in structs}


def _members(traced: TracedModule, name: str) -> list[str]:
    """The checkpoint's names of one parameter: of each block, where it is stacked."""
    return [name.replace("*", str(i)) for i in range(traced.depth(name))] if "*" in name else [name]


def _list(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{len(names)} {what} ({', '.join(names[:4])}{more}); "
