"""Devices as a mesh, and parameters laid out on it by rules over their names.

Axes: ``dp`` splits the batch (the two halves of classifier-free guidance), ``tp`` splits heads and widths.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpuvid.errors import InputError
from tpuvid.layout import MeshConfig

Rule = tuple[str, tuple[str | None, ...]]
"""(pattern, axes): a parameter whose whole name matches the regular expression has its last dimensions split over `axes`."""


def default_mesh_config(devices: int, sizes: Iterable[int], *, guidance: bool = False) -> MeshConfig:
    """Guidance's two halves over dp where the devices are even; the largest tp that divides the rest and all `sizes`."""
    dp = 2 if guidance and devices % 2 == 0 else 1
    return MeshConfig(dp=dp, tp=math.gcd(devices // dp, *sizes))


def split_sizes(parameters: Mapping[str, jax.ShapeDtypeStruct], rules: Sequence[Rule]) -> set[int]:
    """The dimensions that `rules` split over tp."""
    specs = {name: _spec(name, struct, rules)[0] for name, struct in parameters.items()}
    return {size for name, spec in specs.items() for size, axis in zip(parameters[name].shape, spec) if axis == "tp"}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A ("dp", "tp") mesh over the first dp · tp devices; raises `InputError` where there are fewer."""
    devices = jax.devices() if devices is None else devices
    wanted = config.dp * config.tp
    if wanted > len(devices):
        raise InputError(f"mesh dp={config.dp},tp={config.tp} needs {wanted} devices; this machine has {len(devices)}")
    return Mesh(np.array(devices[:wanted]).reshape(config.dp, config.tp), ("dp", "tp"))


def shard_parameters(
    parameters: Mapping[str, jax.ShapeDtypeStruct], rules: Sequence[Rule], mesh: Mesh
) -> dict[str, NamedSharding]:
    """The sharding of each parameter: the first rule that matches its name, else replicated.

    Raises `ValueError` for a rule that matches nothing (a misspelt name would silently replicate), and `InputError`
    where the mesh does not divide a dimension.
    """
    shardings, used = {}, set()
    for name, struct in parameters.items():
        spec, pattern = _spec(name, struct, rules)
        used.add(pattern)
        for size, axis in zip(struct.shape, spec):
            if axis is not None and size % mesh.shape[axis]:
                raise InputError(f"mesh {axis}={mesh.shape[axis]} does not divide {name} {struct.shape}; choose another --mesh")
        shardings[name] = NamedSharding(mesh, PartitionSpec(*spec))
    if unused := [pattern for pattern, _ in rules if pattern not in used]:
        raise ValueError(f"sharding rules that match no parameter: {unused}")
    return shardings


def _spec(name: str, struct: jax.ShapeDtypeStruct, rules: Sequence[Rule]) -> tuple[tuple[str | None, ...], str | None]:
    """The axes of every dimension of one parameter, and the pattern that gave them (None: replicated)."""
    for pattern, axes in rules:
        if re.fullmatch(pattern, name):
            return (None,) * (len(struct.shape) - len(axes)) + axes, pattern
    return (), None
