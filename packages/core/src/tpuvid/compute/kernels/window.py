"""A sliding window: which tokens of a video see each other, and which blocks of scores a kernel then has to visit.

Tokens stand in *runs* of equal length: the tokens of a frame, or of a few, or so many in a row. A token sees the runs that are
at most `reach` away from its own. Source: sliding-window attention (arXiv:2004.05150), over the frames of a video.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from tpuvid.compute.kernels.block_sizes import LANES, Blocks

COLUMNS = LANES
"""More channels of Q and K that say what is hidden; half of the matrix units' contraction of 256 is free for them."""
HIDDEN = COLUMNS - 1
"""The column of the keys that no query sees."""
FORBIDDING = -(2.0**24)
"""What is added to q·k of a pair that doesn't see each other: with any usual scale more than a million below what is seen, and
still so near that a difference of two such scores is exact to a fraction."""
BLOCKS = Blocks(q=1024, kv=2048, kv_compute=1024)
"""The blocks of a windowed call: smaller than without a window, since what of a block is hidden is computed all the same."""


class Window(NamedTuple):
    run: int
    """Tokens in a row that see the same."""
    reach: int
    """Runs before and after its own that a token sees."""

    @classmethod
    def of_frames(cls, frames: int, *, tokens_per_frame: int, total: int) -> Window | None:
        """A window of at least `frames` frames of tokens to either side; None where that is all `total` tokens."""
        return cls._coarse_enough(frames * tokens_per_frame, tokens_per_frame, total)

    @classmethod
    def of_tokens(cls, tokens: int, *, total: int) -> Window | None:
        """A window of at least `tokens` tokens to either side; None where that is all `total` tokens."""
        return cls._coarse_enough(tokens, LANES, total)

    @classmethod
    def _coarse_enough(cls, tokens: int, step: int, total: int) -> Window | None:
        """The shortest run, in whole steps, in which the kernel can tell hidden from seen."""
        windows = (cls(run, -(-tokens // run)) for run in range(step, total + step, step))
        found = next(w for w in windows if w._is_told_apart(total))
        return found if found.reach < -(-total // found.run) - 1 else None

    def _is_told_apart(self, total: int) -> bool:
        """Runs are numbered modulo `HIDDEN`: within the blocks that a query meets, no hidden one has a seen one's number."""
        runs = -(-total // self.run)
        met = 2 * self.reach + -(-BLOCKS.q // self.run) + -(-BLOCKS.kv // self.run) + 2
        return runs <= HIDDEN or met <= HIDDEN

    def seen(self, place: int | np.ndarray, places: int) -> tuple[np.ndarray, np.ndarray]:
        """The first of `places` tokens that the one at `place` sees, and the one after the last."""
        run = np.asarray(place) // self.run
        return np.clip((run - self.reach) * self.run, 0, places), np.clip((run + self.reach + 1) * self.run, 0, places)


class Band(NamedTuple):
    """A window as one call of attention has it."""

    window: Window
    places: int
    """The first so many keys stand in the order of the window; all queries see those after them."""
    parts: int = 1
    part: int | Array = 0
    """The queries are this one of so many equal parts of all places."""

    def mask(self, queries: int, keys: int) -> Bool[Array, "T S"]:
        """What sees what, in full; for tests, and for what is short."""
        runs = (self.part * queries + jnp.arange(queries)) // self.window.run
        key = jnp.arange(keys)
        return (jnp.abs(runs[:, None] - key // self.window.run) <= self.window.reach) | (key >= self.places)


def query_columns(band: Band, queries: int, dtype) -> Float[Array, "T C"]:
    """`FORBIDDING` at the columns of keys that a query doesn't see, 0 at the others."""
    runs = (band.part * queries + jnp.arange(queries)) // band.window.run
    ahead = (jnp.arange(COLUMNS) - runs[:, None]) % HIDDEN  # of a key's run, modulo
    seen = (ahead <= band.window.reach) | (ahead >= HIDDEN - band.window.reach)
    return jnp.where(seen & (jnp.arange(COLUMNS) != HIDDEN), 0, FORBIDDING).astype(dtype)


def key_columns(band: Band, kept: Bool[Array, "B S"], dtype) -> Float[Array, "B S C"]:
    """One 1 for a key's run, or for one that isn't `kept`; none for one that all see."""
    key = jnp.arange(kept.shape[1])
    column = jnp.where(key < band.places, key // band.window.run % HIDDEN, COLUMNS)
    return (jnp.where(kept, column, HIDDEN)[..., None] == jnp.arange(COLUMNS)).astype(dtype)


class Visit(NamedTuple):
    """One block of queries with one of keys."""

    query: int
    """Number of its block."""
    key: int
    number: int
    """The visit's number among those of its queries."""
    last: int
    """1 where it is the last visit of its queries."""


def visits(band: Band, queries: int, keys: int, blocks: Blocks) -> Int[np.ndarray, "P 4 V"]:
    """The visits of each part's blocks that hold anything seen, first those that all queries see as a whole."""
    tables = [list(_visits_of(band._replace(part=part), queries, keys, blocks)) for part in range(band.parts)]
    most = max(map(len, tables))
    for table in tables:  # what is only there to make parts alike does the last visit's work on a number of its own
        table += [table[-1]] * (most - len(table))
    return np.array(tables, np.int32).swapaxes(1, 2)


def _visits_of(band: Band, queries: int, keys: int, blocks: Blocks) -> Iterator[Visit]:
    key_starts = np.arange(0, keys, blocks.kv)
    key_ends = np.minimum(key_starts + blocks.kv, keys)
    for number, start in enumerate(range(0, queries, blocks.q)):
        places = np.asarray(band.part * queries + np.array([start, min(start + blocks.q, queries) - 1]))
        firsts, ends = band.window.seen(places, band.places)
        met = (key_starts < ends[1]) & (key_ends > firsts[0]) | (key_ends > band.places)
        whole = (key_starts >= firsts[1]) & (key_ends <= ends[0]) | (key_starts >= band.places)
        order = [*np.flatnonzero(met & whole), *np.flatnonzero(met & ~whole)]
        for n, key in enumerate(order):
            yield Visit(number, int(key), n, int(n == len(order) - 1))
