"""Devices as a mesh, and parameters laid out on it by rules over their names.

Axes: ``dp`` splits the batch (the two halves of classifier-free guidance), ``sp`` the tokens, ``tp`` heads and widths.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpuvid.compute.kernels.placement import SP
from tpuvid.contract.layout import AXES, MeshConfig
from tpuvid.errors import InputError

Rule = tuple[str, tuple[str | None, ...]]
"""(pattern, axes): a parameter whose whole name matches the regular expression has its last dimensions split over `axes`."""


def default_mesh_config(devices: int, sizes: Iterable[int] = (), *, guidance: bool = False, tokens: bool = False) -> MeshConfig:
    """Guidance's two halves over dp where the devices are even; over the rest `tokens` where they can be split, else
    the largest tp that divides it and all `sizes`."""
    dp = 2 if guidance and devices % 2 == 0 else 1
    return MeshConfig(dp=dp, sp=devices // dp) if tokens else MeshConfig(dp=dp, tp=math.gcd(devices // dp, *sizes))


def split_sizes(parameters: Mapping[str, jax.ShapeDtypeStruct], rules: Sequence[Rule]) -> set[int]:
    """The dimensions that `rules` split over tp."""
    specs = {name: _spec(name, struct, rules)[0] for name, struct in parameters.items()}
    return {
        size for name, spec in specs.items() for size, axis in zip(parameters[name].shape, spec, strict=False) if axis == "tp"
    }


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `AXES` over the first devices, as many as it needs; raises `InputError` where there are fewer."""
    devices = jax.devices() if devices is None else devices
    if config.size > len(devices):
        raise InputError(
            f"mesh {config} needs {config.size} devices; there {'is' if len(devices) == 1 else 'are'} {len(devices)}"
        )
    return Mesh(np.array(devices[: config.size]).reshape(config.dp, config.sp, config.tp), AXES)


def layout_of(stage: Any) -> MeshConfig | None:
    """How an opened stage lies on its `mesh`; None for one that has none, or a plugin's own with other axes."""
    mesh = getattr(stage, "mesh", None)
    if mesh is None or tuple(mesh.shape) != AXES:
        return None
    return MeshConfig(**mesh.shape, fsdp=stage.traced.fsdp if mesh.shape[SP] > 1 else None)


FSDP = ("dp", SP)
"""The axes over which the weights of blocks are split, to be gathered block by block. Paper: arXiv:2304.11277."""


def fsdp_axis(shape: tuple[int, ...], mesh: Mesh) -> int | None:
    """The axis along which a block's weight of this shape is split over `FSDP`: the longest that divides; None: it isn't."""
    devices = math.prod(mesh.shape[axis] for axis in FSDP)
    axes = [axis for axis, size in enumerate(shape) if size % devices == 0]
    return max(axes, key=lambda axis: shape[axis], default=None)


def fsdp_spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How the stacked weights [depth, …] of blocks are split over `FSDP`."""
    axis = fsdp_axis(shape[1:], mesh)
    return PartitionSpec() if axis is None else PartitionSpec(*(None,) * (axis + 1), FSDP)


def shard_parameters(
    parameters: Mapping[str, jax.ShapeDtypeStruct], rules: Sequence[Rule], mesh: Mesh, *, fsdp: bool = False
) -> dict[str, NamedSharding]:
    """The sharding of each parameter: the first rule that matches its name, else replicated; with `fsdp`, of blocks by
    `fsdp_spec` instead.

    Raises `ValueError` for a rule that matches nothing (a misspelt name would silently replicate), and `InputError`
    where the mesh does not divide a dimension.
    """
    shardings, used = {}, set()
    for name, struct in parameters.items():
        spec, pattern = _spec(name, struct, rules)
        used.add(pattern)
        for size, axis in zip(struct.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise InputError(f"mesh {axis}={mesh.shape[axis]} does not divide {name} {struct.shape}; choose another --mesh")
        shardings[name] = NamedSharding(mesh, fsdp_spec(struct.shape, mesh) if fsdp and "*" in name else PartitionSpec(*spec))
    if unused := [pattern for pattern, _ in rules if pattern not in used]:
        raise ValueError(f"sharding rules that match no parameter: {unused}")
    return shardings


def _spec(name: str, struct: jax.ShapeDtypeStruct, rules: Sequence[Rule]) -> tuple[tuple[str | None, ...], str | None]:
    """The axes of every dimension of one parameter, and the pattern that gave them (None: replicated)."""
    for pattern, axes in rules:
        if re.fullmatch(pattern, name):
            return (None,) * (len(struct.shape) - len(axes)) + axes, pattern
    return (), None
