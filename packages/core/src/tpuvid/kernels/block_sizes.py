"""Tile sizes of the splash kernel, as data with provenance."""

from typing import NamedTuple


class Blocks(NamedTuple):
    q: int
    kv: int
    kv_compute: int


LANES = 128

# Wan 2.1 720p on v6e-8 (5 heads, S = 75,600, D = 128): predicted 41.6 ms per call by counting VLIW bundles, the least
# that a search of this kernel found (2026-11; the 3328/2816/256 of earlier ports: 44.4 predicted, 43.93 measured).
LONG = Blocks(q=3024 // LANES * LANES, kv=2048, kv_compute=1024)


def splash_blocks(queries: int, keys: int, dim: int) -> Blocks:
    """Blocks for these sequence lengths: `LONG`, shrunk to the lengths where they are shorter and to VMEM for wider heads."""
    widths = _round_up(dim) // LANES  # a VAE's single head has 384 or 1024 channels
    kv = min(_round_up(LONG.kv // widths), _round_up(keys))
    compute = LONG.kv_compute if kv % LONG.kv_compute == 0 else LANES
    return Blocks(q=min(_round_up(LONG.q // widths), _round_up(queries)), kv=kv, kv_compute=compute)


def _round_up(length: int) -> int:
    return -(-length // LANES) * LANES
