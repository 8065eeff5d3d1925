"""Collectives on a slice: which links they cross and what that takes."""

import pytest
from tpuvid.plan.links import collective_cost, ring_order, wraps
from tpuvid.plan.topologies import parse_topology

V6E_8 = parse_topology("v6e-8")
COORDS = [(x, y, 0) for y in range(4) for x in range(2)]  # as JAX orders a v6e-8
LINK = 90e9
BLOCKS = [[0, 1, 2, 3], [4, 5, 6, 7]]  # 2×2
LINES = [[0, 2, 4, 6], [1, 3, 5, 7]]  # 1×4
ALL = [list(range(8))]


@pytest.mark.parametrize(
    "kind, groups, per_byte, sent",
    [
        ("all-reduce", BLOCKS, 3 / 4, 3 / 2),  # (n−1)/n each way round
        ("all-reduce", ALL, 7 / 8, 7 / 4),
        ("all-reduce", LINES, 3 / 2, 3 / 2),  # the ring comes back over the line's own links
        ("all-gather", BLOCKS, 3 / 8, 3 / 4),
        ("reduce-scatter", BLOCKS, 3 / 8, 3 / 4),
        ("all-to-all", BLOCKS, 1 / 2, 3 / 4),  # a quarter to the neighbour, and half of what two send across
        ("all-to-all", ALL, 1, 7 / 8),  # 4 chips send 4/8 each over the middle's two links
        ("collective-permute", [(0, 4), (1, 5)], 1, 1),
        ("collective-permute", [(0, 4), (2, 6)], 2, 1),  # both cross the link between the second and the third row
    ],
)
def test_seconds_are_the_busiest_links(kind, groups, per_byte, sent):
    seconds, bytes_sent = collective_cost(kind, 10**9, groups, COORDS, V6E_8)
    assert seconds == pytest.approx(per_byte * 1e9 / LINK)
    assert bytes_sent == pytest.approx(sent * 1e9)


def test_a_wrapped_line_is_a_ring():
    pod = parse_topology("v6e-256")
    line = [(0, y, 0) for y in range(16)]
    assert wraps(pod, 16) and not wraps(V6E_8, 4)
    seconds, _ = collective_cost("all-reduce", 10**9, [list(range(16))], line, pod)
    assert seconds == pytest.approx(15 / 16 * 1e9 / LINK)


def test_cores_of_one_chip_share_its_links():
    slice_ = parse_topology("tpu7x-8")
    coords = [(x, y, 0) for y in range(2) for x in range(2) for _core in range(2)]
    within, _ = collective_cost("all-reduce", 10**9, [[0, 1], [2, 3]], coords, slice_)
    assert within == 0, "no link is crossed"
    across, _ = collective_cost("all-reduce", 10**9, [list(range(8))], coords, slice_)
    assert across == pytest.approx(7 / 8 * 1e9 / 100e9)


@pytest.mark.parametrize("shape", [(2, 2), (2, 4), (4, 2), (3, 4), (4, 3), (4, 4)])
def test_rings_of_blocks_close(shape):
    chips = [(x, y, 0) for x in range(shape[0]) for y in range(shape[1])]
    ring = ring_order(chips)
    assert sorted(ring) == chips
    assert all(sum(abs(a - b) for a, b in zip(p, q, strict=True)) == 1 for p, q in zip(ring, ring[1:] + ring[:1], strict=True))


def test_a_collective_without_a_model_fails():
    with pytest.raises(ValueError, match="no cost is known"):
        collective_cost("collective-broadcast", 1, BLOCKS, COORDS, V6E_8)
