"""TPU slices by the names that users rent, and what the vendor says of their chips. Imports neither jax nor torch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tpuvid.compute.chips import CHIPS, Chip
from tpuvid.errors import InputError

MOST_CHIPS = 256
LOCAL = ("cpu", "gpu")
"""Topologies that this machine's own backend answers for."""
INSTALL_LIBTPU = "pip install 'tpuvid-core[tpu]'"

SHAPES: dict[int, dict[int, tuple[int, ...]]] = {
    2: {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)},
    3: {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8)},
}
"""The slice that is rented under each number of chips, by the interconnect's dimensions."""


@dataclass(frozen=True, slots=True)
class Topology:
    """A slice: `chip` and how many of them lie along each dimension."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """The number of devices, as JAX counts them."""
        return self.chips * self.chip.devices_per_chip

    @property
    def libtpu_name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def host(self) -> tuple[int, ...]:
        """Chips of one host, along each dimension."""
        padded = self.shape + (1,) * (3 - len(self.shape))
        host = self.chip.largest_host if self.chips <= math.prod(self.chip.largest_host) else (2, 2, 1)
        return tuple(min(a, b) for a, b in zip(host, padded, strict=True))

    def environment(self, flags: str = "") -> dict[str, str]:
        """The variables of a process in which libtpu compiles for this slice: it must not look for a cloud machine, nor be
        kept from running beside another compile. `flags` are libtpu's own."""
        accelerator = "v5litepod" if self.chip.name == "v5e" else self.chip.name
        return {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_ACCELERATOR_TYPE": f"{accelerator}-8",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip(),
            "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "3"),
        }

    def jax_devices(self) -> list:
        """The slice's devices, to lower and compile for; within a process that has `environment`."""
        from jax.experimental import topologies

        description = topologies.get_topology_desc(self.libtpu_name, "tpu", chips_per_host_bounds=self.host)
        return list(description.devices)


def parse_topology(text: str, *, also: Sequence[str] = LOCAL) -> Topology:
    """Read "v6e-8" (as slices are rented: chips, or for v5p and tpu7x cores) or "v6e:2x4" (as libtpu says it).

    Raises `InputError` for what no slice is called; `also` are names that it offers beside those of slices.
    """
    found = re.fullmatch(r"([a-z]+\d?[a-z0-9]*?)(?:-(\d+)|:(\d+(?:x\d+)*))", text.strip().lower())
    chip = next((c for c in CHIPS if found and found[1] in (c.name, *c.aliases)), None)
    if found is None or chip is None:
        raise InputError(f"topology={text!r}: is no TPU slice; choose from {', '.join([*known_topologies(), *also])}")
    shape: tuple[int, ...] | None
    if found[3]:
        shape = tuple(map(int, found[3].split("x")))
        if len(shape) != chip.dimensions or 0 in shape:
            form = "x".join("244"[: chip.dimensions])
            raise InputError(
                f"topology={text!r}: {chip.name} has {chip.dimensions} dimensions; give one like {chip.name}:{form}"
            )
        asked = Topology(text, chip, shape)
        if asked.chips > MOST_CHIPS or any(size % host for size, host in zip(shape, asked.host, strict=False)):
            hosts = "x".join(map(str, asked.host[: chip.dimensions]))
            raise InputError(f"topology={text!r}: needs whole hosts of {hosts} chips, and {MOST_CHIPS} chips at most")
    else:
        chips = int(found[2]) // chip.cores_per_chip
        shape = SHAPES[chip.dimensions].get(chips)
        if shape is None or chips * chip.cores_per_chip != int(found[2]):
            sizes = ", ".join(_name(chip, n) for n in SHAPES[chip.dimensions])
            raise InputError(f"topology={text!r}: {chip.name} comes as {sizes}")
    chips = math.prod(shape)
    standard = SHAPES[chip.dimensions].get(chips) == shape
    name = _name(chip, chips) if standard else f"{chip.name}:{'x'.join(map(str, shape))}"
    return Topology(name, chip, shape)


def check_topology(text: str) -> None:
    """Raise `InputError` for a name that is no topology, or one that needs libtpu where that isn't installed."""
    if text not in LOCAL:
        parse_topology(text)
        require_libtpu()


def known_topologies() -> list[str]:
    """Names of the slices up to 16 chips."""
    return [_name(chip, n) for chip in CHIPS for n in SHAPES[chip.dimensions] if n <= 16]


def slices_of(chip: Chip, *, more_than: int) -> list[Topology]:
    """Slices of more chips than that, up to 16, smallest first."""
    return [parse_topology(_name(chip, n)) for n in SHAPES[chip.dimensions] if more_than < n <= 16]


def _name(chip: Chip, chips: int) -> str:
    return f"{chip.name}-{chips * chip.cores_per_chip}"


def require_libtpu() -> Path:
    """The folder of libtpu; raises `InputError` where it isn't installed."""
    spec = find_spec("libtpu")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"libtpu, which compiles for TPUs, is not installed; {INSTALL_LIBTPU} brings it (no TPU is needed)")
    return Path(spec.submodule_search_locations[0])
