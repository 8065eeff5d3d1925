"""What the vendor says of TPU chips. Imports neither jax nor torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chip:
    """One device as JAX counts them: a chip of v4, v5e, v5p or v6e; one of the two cores of a tpu7x chip.

    Source: the vendor's pages on each TPU version (2026-11). v4 is left out: libtpu compiles for single cores, JAX runs pairs.
    """

    name: str
    device_kind: str
    """The kind of device, as JAX names it."""
    clock_ghz: float | None
    """The VLIW core's clock; None where counting its bundles gives times above the peak, so that the clock can't be right."""
    bf16_tflops: float
    hbm_gb: float
    usable_gib: float
    """The part of its HBM that libtpu 0.0.42.1 gives to programs, as its own out-of-memory errors say."""
    hbm_gb_per_s: float
    link_gb_per_s: float
    """The bandwidth of one interconnect link, one way."""
    dimensions: int
    """The dimensions of the interconnect: a 2D mesh or a 3D torus."""
    largest_host: tuple[int, int, int]
    """Chips along each dimension of a host that is a slice by itself; larger slices have hosts of 2×2×1."""
    devices_per_chip: int = 1
    cores_per_chip: int = 1
    """The cores that the older naming schemes count: a v5p-8 has four chips."""
    aliases: tuple[str, ...] = ()


CHIPS = (
    Chip("v5e", "TPU v5 lite", None, 197, 16, 15.75, 819, 50, 2, (2, 4, 1), aliases=("v5litepod", "v5lite")),
    Chip("v5p", "TPU v5", None, 459, 95, 95.74, 2765, 100, 3, (2, 2, 1), cores_per_chip=2),
    Chip("v6e", "TPU v6 lite", 1.75, 918, 32, 31.25, 1638, 90, 2, (2, 4, 1), aliases=("trillium",)),
    Chip("tpu7x", "TPU7x", None, 2307 / 2, 96, 94.75, 7380 / 2, 100, 3, (2, 2, 1), devices_per_chip=2, cores_per_chip=2,
         aliases=("v7x", "ironwood")),
)  # fmt: skip
