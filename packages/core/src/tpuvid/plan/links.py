"""What collectives take on a slice's interconnect: bytes over the busiest link. Imports neither jax nor torch.

Chips are neighbours along each dimension of the slice; each pair has a link that carries `Chip.link_gb_per_s` each way at once.
Every transfer goes by the shortest way, one dimension after the other, and loads each directed link that it crosses;
all groups of a collective work at once. The time is the load of the busiest directed link over its bandwidth:

- all-reduce of B bytes in a group of n: the group's chips in a ring, half of the data each way round; reduce-scatter, then
  all-gather: each chip sends 2(n−1)/n · B. Where the group is a block with a cycle (a 2×2, a 2×4) each step of the ring is one
  link, which carries (n−1)/n · B each way; in a line without wrap-around the last step comes back over the same links, which
  carry twice that;
- all-gather to B bytes, reduce-scatter of B bytes: half of that;
- all-to-all of B bytes: B/n from every member to every other, half of it dimension by dimension, half in the
  reverse order;
- collective-permute of B bytes: B from each source to its target.

Rings in both directions are what libtpu's compiler reports for large all-reduces on a v6e-8 ("colors:2", libtpu 0.0.42).
Left out: latencies (about 1 µs per step: matters below a megabyte), rings along several dimensions at once (which XLA
has for slices wider than two chips, so that large groups there are faster than said here), links between slices, and what the
two cores of a tpu7x chip exchange, which crosses no link.

Sources: the vendor's pages (bandwidths); "How to Scale Your Model" (jax-ml.github.io/scaling-book, 2025) for the costs of
rings, for wrap-around (v5e, v6e: where a dimension has 16 chips; 3D slices: multiples of 4), and for latency; Chan et al. 2007,
"Collective communication: theory, practice, and experience", for the lower bounds that rings meet.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise, product

from tpuvid.plan.topologies import Topology

Coords = tuple[int, ...]


def collective_cost(
    kind: str, payload: int, members: Sequence[Sequence[int]], coords: Sequence[Coords], topology: Topology
) -> tuple[float, float]:
    """Seconds, and bytes that a device sends.

    `payload`: bytes per device of what is reduced, exchanged or sent, for an all-gather of its result; `members`: places in the
    mesh by group, for a collective-permute (source, target); `coords`: where the chip of each place stands in the slice.
    """
    loads: dict[tuple[Coords, Coords], float] = defaultdict(float)
    sent = 0.0
    for group in members:
        n = len(group)
        chips = [tuple(coords[place]) for place in group]
        match kind:
            case "collective-permute":
                sent = payload
                _load(loads, chips[0], chips[1], payload, topology)
            case "all-to-all" | "ragged-all-to-all":
                sent = payload * (n - 1) / n
                for a, b in product(chips, chips):
                    _load(loads, a, b, payload / n, topology)
            case "all-reduce" | "all-gather" | "reduce-scatter":
                sent = payload * (n - 1) / n * (2 if kind == "all-reduce" else 1)
                ring = ring_order(chips)
                for a, b in zip(ring, ring[1:] + ring[:1], strict=True):
                    _load(loads, a, b, sent / 2, topology)
                    _load(loads, b, a, sent / 2, topology)
            case _:
                raise ValueError(f"no cost is known of the collective {kind!r}")
    return max(loads.values(), default=0) / (topology.chip.link_gb_per_s * 1e9), sent


def ring_order(chips: Sequence[Coords]) -> list[Coords]:
    """The chips so that neighbours follow each other, and the last is a neighbour of the first where they form a block with a
    cycle; the cores of one chip stay together."""
    spread = [sorted({chip[axis] for chip in chips}) for axis in range(len(chips[0]))]
    distinct = sorted(set(chips), key=lambda chip: _snake(chip, spread))
    axes = [axis for axis, values in enumerate(spread) if len(values) > 1]
    if len(axes) == 2 and len(spread[axes[0]]) * len(spread[axes[1]]) == len(distinct):
        odd = [axis for axis in axes if len(spread[axis]) % 2]
        if len(odd) < 2:
            across = odd[0] if odd else axes[0]  # the other one has an even number of rows
            along = axes[1] if across == axes[0] else axes[0]
            back = [chip for chip in distinct if chip[across] == spread[across][0]]  # one lane is kept for the way back
            rest = [chip for chip in distinct if chip not in back]
            there = sorted(rest, key=lambda chip: _snake((chip[along], chip[across]), [spread[along], spread[across]]))
            distinct = there + sorted(back, key=lambda chip: -chip[along])
    counts = Counter(chips)
    return [chip for chip in distinct for _ in range(counts[chip])]


def _snake(chip: Coords, spread: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """A key that goes through a block row by row, every other row backwards."""
    key: list[int] = []
    for value, values in zip(chip, spread, strict=True):
        at = values.index(value)
        key.append(len(values) - 1 - at if sum(key) % 2 else at)
    return tuple(key)


def _load(loads: dict[tuple[Coords, Coords], float], source: Coords, target: Coords, amount: float, topology: Topology) -> None:
    """Half of it goes dimension by dimension, half in the reverse order of dimensions."""
    axes = range(len(source))
    for order in (axes, reversed(axes)):
        for step in pairwise(_route(source, target, order, topology)):
            loads[step] += amount / 2


def _route(source: Coords, target: Coords, axes: Iterable[int], topology: Topology) -> Iterator[Coords]:
    at = list(source)
    yield tuple(at)
    for axis in axes:
        size = topology.shape[axis] if axis < len(topology.shape) else 1
        distance = target[axis] - source[axis]
        if wraps(topology, size) and abs(distance) > size / 2:
            distance -= size if distance > 0 else -size
        for _ in range(abs(distance)):
            at[axis] = (at[axis] + (1 if distance > 0 else -1)) % size
            yield tuple(at)


def wraps(topology: Topology, size: int) -> bool:
    """Whether the last chip of a dimension of `size` is linked to the first."""
    return size == 16 if topology.chip.dimensions == 2 else size % 4 == 0
