"""Tile sizes of the flash kernel, as data with provenance: rows of model packages (`tables_in_use`), and the user's own.

`tpuvid tune attention` writes them: into this package's table, or a file that the variable TPUVID_BLOCK_SIZES then names. The
user's rows come before the package's, and those before the models'.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax


class Blocks(NamedTuple):
    q: int
    kv: int
    kv_compute: int


class AttentionShape(NamedTuple):
    """One call of the kernel on one device, per batch item."""

    heads: int
    queries: int
    keys: int
    head_dim: int


class Row(NamedTuple):
    """The best blocks found for one shape, bfloat16, on one chip."""

    chip: str
    """The device's kind, as JAX names it: "TPU v6 lite"."""
    heads: int
    queries: int
    keys: int
    head_dim: int
    block_q: int
    block_kv: int
    block_kv_compute: int
    predicted_ms: float
    jax: str
    libtpu: str
    date: str
    command: str

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(self.heads, self.queries, self.keys, self.head_dim)

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.block_q, self.block_kv, self.block_kv_compute)


LANES = 128
TABLE = Path(__file__).with_name("block_sizes.json")
"""The table that `tpuvid tune attention` writes; not there until it has done so."""
VARIABLE = "TPUVID_BLOCK_SIZES"
_tables: ContextVar[tuple[Path, ...]] = ContextVar("tables", default=())
LONG = Blocks(q=2048, kv=4096, kv_compute=1024)
"""The blocks where no row is of the shape. Wan 2.1 720p on v6e-8 (5 heads, S = 75,600, D = 128): predicted 26.2 ms per call
(2026-11)."""


def flash_blocks(queries: int, keys: int, dim: int, *, heads: int | None = None, chip: str | None = None) -> Blocks:
    """Blocks for these sequence lengths on this kind of chip (None: whatever runs on any).

    The row of exactly this shape; else `LONG`, for wider heads shrunk to VMEM. What was searched for other lengths may not
    fit into VMEM, so it isn't taken for them. The number of heads decides only between equal rows. The kernel takes
    no larger blocks than there are queries and keys.
    """
    shape = chip, queries, keys, dim
    exact = [r for r in block_rows() if (r.chip, r.queries, r.keys, r.head_dim) == shape]
    if exact:
        return next((r for r in exact if r.heads == heads), exact[0]).blocks
    widths = round_up(dim) // LANES  # a VAE's single head has 384 or 1024 channels
    return Blocks(round_up(LONG.q // widths), round_up(LONG.kv // widths), round_up(LONG.kv_compute // widths))


@contextmanager
def tables_in_use(tables: Sequence[Path]) -> Iterator[None]:
    """Within it, the rows of these files apply too, where there is no other for a shape."""
    token = _tables.set(tuple(tables))
    try:
        yield
    finally:
        _tables.reset(token)


def block_rows() -> Sequence[Row]:
    """Every row that applies here: of each table for shapes that those before it don't have.

    Raises `ValueError` for a file that is no table.
    """
    found: list[Row] = []
    tables: list[str | Path] = [*filter(None, [os.environ.get(VARIABLE)]), *[TABLE] * TABLE.exists(), *_tables.get()]
    for table in tables:
        taken = {(r.chip, r.shape._replace(heads=0)) for r in found}
        found += [r for r in _cached_rows(Path(table).expanduser()) if (r.chip, r.shape._replace(heads=0)) not in taken]
    return found


def read_rows(path: Path) -> list[Row]:
    """Raises `ValueError` if `path` is no table of block sizes."""
    try:
        rows = [Row(**row) for row in json.loads(path.read_text("utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: is no table of block sizes ({error}); give a file that tpuvid tune wrote, or unset {VARIABLE}"
        ) from None
    for row in rows:
        numbers = (*row.shape[:4], *row.blocks)
        if not isinstance(row.chip, str) or not all(type(x) is int and x > 0 for x in numbers):
            raise ValueError(
                f"{path}: a row's chip is no name, or its sizes are no whole numbers; give a file that tpuvid tune wrote"
            )
        sizes = row.blocks
        if not all(isinstance(x, int) and x > 0 and x % LANES == 0 for x in sizes) or sizes.kv % sizes.kv_compute:
            raise ValueError(f"{path}: blocks {tuple(sizes)}: need multiples of {LANES}, and block_kv of block_kv_compute")
    return rows


def device_chip(device: jax.Device, dtype) -> str | None:
    """The rows of which chip a kernel on `device` reads; None for what they weren't searched for."""
    return device.device_kind if device.platform == "tpu" and jax.numpy.dtype(dtype).itemsize == 2 else None


@cache
def _cached_rows(path: Path) -> tuple[Row, ...]:
    return tuple(read_rows(path))


def round_up(length: int) -> int:
    """Round up to whole lanes."""
    return -(-length // LANES) * LANES
