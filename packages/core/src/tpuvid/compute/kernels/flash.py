"""Flash attention on a TPU, transposed and without a running maximum: exact, and bound by the matrix units.

Per tile of scores, Sᵀ = K Qᵀ, Pᵀ = 2^(c·Sᵀ − m), Oᵀ += Vᵀ Pᵀ. What makes it fast on a v6e (predicted cycles per call of
Wan 2.1 720p, 5 heads, S = 75,600, D = 128; JAX's splash attention 41.6 to 44.4 ms, this 26.2 ms; bound 23.9 ms):

- *Transposed*, the statistics of a query lie along sublanes, and no reduction crosses lanes.
- *No maximum.* Softmax is the same for any m; m only has to keep 2^(c·s − m) within float32. It starts as the maximum over
  the first keys, and after each block of keys grows by the exponent of the row's sum, which is there anyway. A row whose sum
  passes 2^48 within one block is computed again with the block's own maximum (`exact`): data decide that, it is rare, and
  the kernel's name begins with "optimistic" to say so to `tpuvid.plan.bundles`.
- *Row sums on the matrix units*: V has 16 more rows, of ones, so the sum is one more row of O. In the rows of masked and of
  padding keys V and the ones are zero: such keys take part in nothing, for free. Their K is a copy of a key that
  counts, so that they can't raise m.
- *Software pipelining in the source*: scores of one tile, 2^x of an earlier and PV of a still earlier one stand side by
  side; the compiler keeps the order of the source.

The scale is applied to scores in float32: rounding a scaled q to bfloat16 would double the error of the result.

Q·K in int8 (`int8`) is an option that gives up exactness: K's channels are scaled by their own ranges, Q takes these over and
is scaled token by token, which costs nothing in the kernel. Without K's mean over all tokens, which changes no softmax
(`smooth_k`), K has smaller ranges. Source of both: SageAttention (arXiv:2410.02367).

With a window (see `kernels.window`), the grid is the list of visits that hold anything seen. What else a block holds is
hidden by the matrix units, in the half of their contraction that D = 128 leaves free: K gets a one-hot column for where a key
stands, and Q, at the columns of what it doesn't see, −2²⁴. Scores that are seen stay what they are to the last bit.

Source: FlashAttention (arXiv:2205.14135, arXiv:2307.08691); the measurements of ideas are in docs/attention.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, Num

from tpuvid.compute.kernels.attention_record import record_attention
from tpuvid.compute.kernels.block_sizes import LANES, AttentionShape, Blocks, flash_blocks, round_up
from tpuvid.compute.kernels.window import BLOCKS, FORBIDDING, Band, Visit, key_columns, query_columns, visits

TILE = 256
"""Queries that are worked on at a time: the width of the matrix unit."""
CHUNK = LANES
"""Keys at a time where speed doesn't matter: for the first m, and in `exact`."""
ONES = 16
"""Rows that V gets for the sums: as many as one bfloat16 register has sublanes."""
LIMIT = 2.0**48
"""The limit of a row's sum within one block; above it the block is computed exactly."""
SCORES_AHEAD, VALUES_BEHIND = 2, 1
"""Tiles between the scores of a tile and its 2^x, and between that and its PV."""
LEAST_SCALE = 1e-4
"""The least scale of scores with a window: with less, what is hidden isn't far enough below what is seen."""
VMEM_BYTES = 32 * 2**20
"""What a call may take; 13 MiB is what D = 128 takes, and the rest of the 64 to 128 of a chip is XLA's."""

NT = (((1,), (1,)), ((), ()))
NN = (((1,), (0,)), ((), ()))


def attention_flash(
    query: Float[Array, "B N T D"],
    key: Float[Array, "B N S D"],
    value: Float[Array, "B N S D"],
    *,
    kv_mask: Bool[Array, "B S"] | None = None,
    band: Band | None = None,
    scale: float | None = None,
    smooth_k: bool = False,
    int8: bool = False,
    chip: str | None = None,
    blocks: Blocks | None = None,
    out_dtype: DTypeLike | None = None,
    interpret: bool = False,
) -> Float[Array, "B N T D"]:
    """What `attention_reference` computes with a mask over keys, and with `Band.mask`. Inputs must be finite where `kv_mask`
    keeps them.

    `smooth_k` takes K's mean away; `int8` rounds Q and K to 8 bits. Raises `ValueError` for what a `band` can't be combined
    with: `int8`, which can't hold its columns, a scale below `LEAST_SCALE`, and larger blocks than a window's own.

    `blocks`: by default those for this shape on `chip`, see `flash_blocks`. `out_dtype`: by default the queries'.
    `interpret` runs the kernel on a CPU.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if smooth_k:
        key = _smoothed(key, kv_mask)
    if band is not None:
        if int8:
            raise ValueError("attention in int8 has no windows; leave out one of them")
        if scale < LEAST_SCALE:
            raise ValueError(f"scale={scale} with a window: hides only with {LEAST_SCALE} or more; scale the queries")
        if blocks is not None and (blocks.q > BLOCKS.q or blocks.kv > BLOCKS.kv):
            raise ValueError(f"blocks={tuple(blocks)} with a window: needs {tuple(BLOCKS)} or smaller ones")
        return _windowed(query, key, value, kv_mask, band, scale, blocks or BLOCKS, out_dtype or query.dtype, interpret)
    batch, heads, queries, dim = query.shape
    keys, dtype = key.shape[2], out_dtype or query.dtype
    record_attention(AttentionShape(heads, queries, keys, dim))
    blocks = blocks or flash_blocks(queries, keys, dim, heads=heads, chip=chip)
    padded = round_up(keys)
    if kv_mask is not None or padded != keys:
        kept = jnp.ones((batch, keys), bool) if kv_mask is None else jnp.broadcast_to(kv_mask, (batch, keys))
        kept = jnp.pad(kept, ((0, 0), (0, padded - keys)))[:, None, :, None]
        first = jnp.take_along_axis(key, jnp.argmax(kept, axis=2)[..., None], axis=2)
        first = jnp.where(kept.any(axis=2, keepdims=True), first, 0)
        key = jnp.where(kept, _pad(key, 2, padded), first)
        value = jnp.where(kept, _pad(value, 2, padded), 0)
        ones = jnp.broadcast_to(jnp.swapaxes(kept, 2, 3), (batch, heads, ONES, padded))
    else:
        ones = jnp.ones((batch, heads, ONES, padded))
    query, key, value = (_pad(x, 3, _wide(dim)) for x in (query, key, value))
    value = jnp.concatenate([jnp.swapaxes(value, 2, 3), ones.astype(value.dtype)], axis=2)
    query = _pad(query, 2, min(blocks.q, round_up(queries))) if queries < blocks.q else query
    steps = None
    if int8:
        query, key, steps = _quantized(query, key)
    out = _call(query, key, value, blocks, queries, scale, dtype, interpret, rows=steps)
    return out[:, :, :queries, :dim]


def _windowed(query, key, value, kv_mask, band: Band, scale, blocks: Blocks, dtype, interpret) -> Float[Array, "B N T D"]:
    """`attention_flash` with a band; all is padded to whole blocks, the keys that all see beginning with one."""
    batch, heads, queries, dim = query.shape
    least = _own_scores(query, key, kv_mask, band) * scale * math.log2(math.e)
    block_q, block_kv = min(blocks.q, round_up(queries)), min(blocks.kv, round_up(key.shape[2]))
    blocks = Blocks(block_q, block_kv, blocks.kv_compute)
    query = jnp.concatenate([_pad(query, 3, _wide(dim)), _per_head(query_columns(band, queries, query.dtype), query)], axis=3)
    query = _pad(query, 2, pl.cdiv(queries, block_q) * block_q)

    def whole_blocks(x: Array, axis: int) -> Array:
        parts = jnp.split(x, [band.places], axis=axis)
        return jnp.concatenate([_pad(part, axis, pl.cdiv(part.shape[axis], block_kv) * block_kv) for part in parts], axis=axis)

    kept = jnp.ones((batch, key.shape[2]), bool) if kv_mask is None else jnp.broadcast_to(kv_mask, (batch, key.shape[2]))
    kept = whole_blocks(kept, 1)
    key, value = (_pad(jnp.where(kept[:, None, :, None], whole_blocks(x, 2), 0), 3, _wide(dim)) for x in (key, value))
    band = band._replace(places=pl.cdiv(band.places, block_kv) * block_kv)
    table = visits(band, queries, key.shape[2], blocks)
    key = jnp.concatenate([key, _per_head(key_columns(band, kept, key.dtype)[:, None], key)], axis=3)
    ones = jnp.broadcast_to(kept[:, None, None], (batch, heads, ONES, key.shape[2])).astype(value.dtype)
    value = jnp.concatenate([jnp.swapaxes(value, 2, 3), ones], axis=2)
    least = _pad(least, 3, query.shape[2])
    out = _call(query, key, value, blocks, queries, scale, dtype, interpret, table=jnp.asarray(table)[band.part], rows=least)
    return out[:, :, :queries, :dim]


def _own_scores(query: Array, key: Array, kv_mask: Array | None, band: Band) -> Float[Array, "B N 1 T"]:
    """q·k of each query with the key in its own place, which it sees whatever else is hidden: it starts its m. Where that key
    is masked, `FORBIDDING`: the first key that is seen then takes the exact path."""
    start = band.part * query.shape[2]
    own = lax.dynamic_slice_in_dim(key, start, query.shape[2], 2)
    scores = jnp.sum(query.astype(jnp.float32) * own.astype(jnp.float32), axis=3)
    if kv_mask is not None:
        kept = lax.dynamic_slice_in_dim(jnp.broadcast_to(kv_mask, (len(key), key.shape[2])), start, query.shape[2], 1)
        scores = jnp.where(kept[:, None], scores, FORBIDDING)
    return scores[:, :, None]


def _smoothed(key: Float[Array, "B N S D"], kv_mask: Bool[Array, "B S"] | None) -> Float[Array, "B N S D"]:
    """The keys without the mean of those that count, which adds the same to all scores of a query."""
    where = None if kv_mask is None else kv_mask[:, None, :, None]
    mean = jnp.mean(key.astype(jnp.float32), axis=2, keepdims=True, where=where)
    return (key - jnp.nan_to_num(mean)).astype(key.dtype)


def _quantized(
    query: Float[Array, "B N T D"], key: Float[Array, "B N S D"]
) -> tuple[Int[Array, "B N T D"], Int[Array, "B N S D"], Float[Array, "B N 1 T"]]:
    """Queries and keys in int8, and by what a query's products are to be multiplied."""

    def rounded(x: Float[Array, " ..."], axis: int) -> tuple[Int[Array, " ..."], Float[Array, " ..."]]:
        step = jnp.maximum(jnp.abs(x).max(axis=axis, keepdims=True) / 127, jnp.finfo(jnp.float32).tiny)
        return jnp.round(x / step).astype(jnp.int8), step

    key, steps = rounded(key.astype(jnp.float32), 2)
    query, step = rounded(query.astype(jnp.float32) * steps, 3)
    return query, key, jnp.swapaxes(step, 2, 3)


def _per_head(columns: Array, like: Float[Array, "B N T D"]) -> Float[Array, "B N T C"]:
    """[T, C] or [B, 1, T, C] for every head."""
    return jnp.broadcast_to(columns, (*like.shape[:3], columns.shape[-1]))


def _wide(dim: int) -> int:
    """Channels of a head, padded."""
    return 64 if dim <= 64 else round_up(dim)


def _pad(x: Array, axis: int, size: int) -> Array:
    """Zeros behind `x` along `axis`."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, pads) if pads[axis][1] else x


def _call(
    query: Num[Array, "B N T C"], key: Num[Array, "B N S C"], value: Float[Array, "B N D1 S"], blocks: Blocks, queries: int,
    scale: float, dtype: DTypeLike, interpret: bool, table: Int[Array, "4 V"] | None = None,
    rows: Float[Array, "B N 1 T"] | None = None,
) -> Float[Array, "B N T D"]:  # fmt: skip
    """T at least one block, of which `queries` count; S in whole lanes. `table`: the visits, where some are left out.

    `rows`: with a table, where a query's m starts at least; of integers, what a query's products are multiplied by.
    """
    batch, heads, length, width = query.shape
    keys, depth = key.shape[2], value.shape[2]
    block_q, block_kv = min(blocks.q, round_up(length)), min(blocks.kv, keys)
    grid: tuple[int, ...]
    if table is None:
        grid = (batch, heads, pl.cdiv(length, block_q), pl.cdiv(keys, block_kv))
        of_query, of_key = (lambda b, n, i, j: i), (lambda b, n, i, j: j)
    else:
        grid = (batch, heads, table.shape[1])
        of_query, of_key = (lambda b, n, v, table: table[0, v]), (lambda b, n, v, table: table[1, v])
    kernel = functools.partial(
        _kernel if rows is None else _with_int8 if table is None else _with_window,
        keys=keys,
        queries=queries,
        compute=blocks.kv_compute,
        scale=scale * math.log2(math.e),
    )
    scores = math.prod(grid) * block_q * block_kv if table is not None else batch * heads * length * keys
    cost = pl.CostEstimate(
        flops=2 * scores * (width + depth),
        transcendentals=scores,
        bytes_accessed=query.dtype.itemsize * (query.size * 2 + scores // block_q * (width + depth)),
    )
    parallel: list[Literal["parallel"]] = ["parallel" for _ in grid[1:]]
    out_shape = jax.ShapeDtypeStruct((batch, heads, length, depth - ONES), dtype)
    return pl.pallas_call(
        functools.partial(_every_step if table is None else _visit_step, kernel),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0 if table is None else 1,
            grid=grid,
            in_specs=[
                pl.BlockSpec((None, None, block_q, width), lambda b, n, *at: (b, n, of_query(b, n, *at), 0)),
                pl.BlockSpec((None, None, block_kv, width), lambda b, n, *at: (b, n, of_key(b, n, *at), 0)),
                pl.BlockSpec((None, None, depth, block_kv), lambda b, n, *at: (b, n, 0, of_key(b, n, *at))),
                *[pl.BlockSpec((None, None, 1, block_q), lambda b, n, *at: (b, n, 0, of_query(b, n, *at)))]
                * (rows is not None),
            ],
            out_specs=pl.BlockSpec((None, None, block_q, depth - ONES), lambda b, n, *at: (b, n, of_query(b, n, *at), 0)),
            scratch_shapes=[pltpu.VMEM((2, 8, block_q), jnp.float32), pltpu.VMEM((2, depth, block_q), jnp.float32)],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(*parallel, "arbitrary"),
            disable_bounds_checks=True,
            vmem_limit_bytes=VMEM_BYTES,
        ),
        cost_estimate=cost,
        interpret=interpret,
        name="optimistic_flash_attention",
    )(*(x for x in (table, query, key, value, rows) if x is not None))


def _every_step(kernel: Callable, *refs) -> None:
    """Every block of queries meets every block of keys."""
    j = pl.program_id(3)
    kernel(pl.program_id(2), j, j == pl.num_programs(3) - 1, *refs)


def _visit_step(kernel: Callable, table, *refs) -> None:
    visit = Visit(*(table[row, pl.program_id(2)] for row in range(len(Visit._fields))))
    kernel(visit.query, visit.number, visit.last == 1, *refs)


def _with_int8(i: Array, j: Array, is_last: Array, q_ref, k_ref, v_ref, steps_ref, *refs, **options) -> None:
    _kernel(i, j, is_last, q_ref, k_ref, v_ref, *refs, **options, steps_ref=steps_ref)


def _with_window(i: Array, j: Array, is_last: Array, q_ref, k_ref, v_ref, least_ref, *refs, **options) -> None:
    _kernel(i, j, is_last, q_ref, k_ref, v_ref, *refs, **options, least_ref=least_ref)


def _kernel(
    i: Array, j: Array, is_last: Array, q_ref, k_ref, v_ref, o_ref, m_ref, acc_ref, *,
    keys: int, queries: int, compute: int, scale: float, steps_ref=None, least_ref=None,
) -> None:  # fmt: skip
    """Block `i` of queries [q, C] against the `j`-th one of keys [kv, C] and values [D + 16, kv] that it meets.

    `steps_ref` [1, q] where Q and K are integers, `least_ref` [1, q] where some keys are hidden.
    `m_ref` [2, 8, q] and `acc_ref` [2, D + 16, q] hold m and [O; sums] before and after it, in turns: what was before
    stays until it is known that what came after is right.
    """
    block_q, block_kv, dim = q_ref.shape[0], k_ref.shape[0], o_ref.shape[1]
    tile = math.gcd(TILE, block_q)
    tiles = range(0, block_q, tile)
    before, after = lax.rem(j, 2), 1 - lax.rem(j, 2)
    multiply = functools.partial(
        lax.dot_general,
        preferred_element_type=jnp.float32,
        precision=lax.Precision.HIGHEST if v_ref.dtype == jnp.float32 else None,
    )

    def scores(keys: pl.Slice | slice, queries: pl.Slice | slice) -> Float[Array, "k q"]:
        """The scores in powers of two, which are what the hardware computes."""
        if steps_ref is None:
            return multiply(k_ref[keys, :], q_ref[queries, :], NT) * scale
        products = lax.dot_general(k_ref[keys, :], q_ref[queries, :], NT, preferred_element_type=jnp.int32)
        return products.astype(jnp.float32) * (steps_ref[:, queries] * scale)

    def values(keys: pl.Slice | slice, p: Float[Array, "k q"]) -> Float[Array, "D1 q"]:
        return multiply(v_ref[:, keys], p.astype(v_ref.dtype), NN)

    def chunk(index: Array) -> pl.Slice | slice:
        return pl.ds(pl.multiple_of(index * CHUNK, CHUNK), CHUNK)

    @pl.when(j == 0)
    def _start():
        acc_ref[0] = jnp.zeros(acc_ref.shape[1:], jnp.float32)
        for t in tiles:
            top = scores(pl.ds(0, CHUNK), pl.ds(t, tile)).max(axis=0, keepdims=True)
            top = top if least_ref is None else jnp.maximum(top, least_ref[:, pl.ds(t, tile)])
            m_ref[0, :, pl.ds(t, tile)] = jnp.broadcast_to(top, (8, tile))

    def block(length: int) -> None:
        """The first `length` keys of the block."""
        parts = [(k, min(compute, length - k)) for k in range(0, length, compute)]
        items = [(pl.ds(k, size), t) for k, size in parts for t in tiles]
        s: dict[int, Array] = {}
        p: dict[int, Array] = {}
        acc: dict[int, Array] = {}
        overflow = jnp.zeros((1, tile), bool)
        for n in range(len(items) + SCORES_AHEAD + VALUES_BEHIND):
            if n < len(items):
                part, t = items[n]
                s[n] = scores(part, pl.ds(t, tile))
            if 0 <= (n1 := n - SCORES_AHEAD) < len(items):
                part, t = items[n1]
                p[n1] = jnp.exp2(s.pop(n1) - m_ref[before, 0:1, pl.ds(t, tile)]).astype(v_ref.dtype)
            if 0 <= (n2 := n - SCORES_AHEAD - VALUES_BEHIND) < len(items):
                part, t = items[n2]
                acc[t] = (acc[t] if t in acc else acc_ref[before, :, pl.ds(t, tile)]) + values(part, p.pop(n2))
                if n2 >= len(items) - len(tiles):  # this tile of queries has met all keys of the block
                    overflow |= finish(t, acc.pop(t))
        pl.when(overflow.astype(jnp.int32).max() > 0)(lambda: exact(length))

    def finish(t: int, acc: Float[Array, "D1 q"]) -> Bool[Array, "1 q"]:
        """Keep a tile of queries, with m such that sums lie in [1, 2) where they would be larger; say where they overflow."""
        columns, total = pl.ds(t, tile), acc[dim : dim + 1]
        up = jnp.floor(jnp.log2(jnp.maximum(total, 1)))
        m_ref[after, :, columns] = m_ref[before, :, columns] + up
        acc_ref[after, :, columns] = acc * jnp.exp2(-up)
        real = i * block_q + t + lax.broadcasted_iota(jnp.int32, (1, tile), 1) < queries
        finite = jnp.sum(acc * 0, axis=0, keepdims=True) == 0  # a sum keeps NaN, a maximum need not
        return real & ~((total < LIMIT) & finite)

    def exact(length: int) -> None:
        """Do what `block` does, by the block's own maximum."""

        def one_tile(t, _):
            columns = pl.ds(pl.multiple_of(t * tile, tile), tile)

            def higher(c, top):
                return jnp.maximum(top, scores(chunk(c), columns).max(axis=0, keepdims=True))

            def add(c, acc):
                return acc + values(chunk(c), jnp.exp2(scores(chunk(c), columns) - m[0:1]))

            old = m_ref[before, :, columns]
            m = jnp.maximum(old, lax.fori_loop(0, length // CHUNK, higher, jnp.full((1, tile), -jnp.inf)))
            m_ref[after, :, columns] = m
            acc = acc_ref[before, :, columns] * jnp.exp2(old - m)[0:1]
            acc_ref[after, :, columns] = lax.fori_loop(0, length // CHUNK, add, acc)
            return 0

        lax.fori_loop(0, len(tiles), one_tile, 0)

    rest = keys - (pl.cdiv(keys, block_kv) - 1) * block_kv
    if rest == block_kv:
        block(block_kv)
    else:
        pl.when(jnp.logical_not(is_last))(lambda: block(block_kv))
        pl.when(is_last)(lambda: block(rest))

    @pl.when(is_last)
    def _finish():
        total = acc_ref[after, dim : dim + 1, :]
        none = total == 0  # no key counts: zeros
        if least_ref is not None:  # no key that counts is seen
            none |= m_ref[after, 0:1, :] < FORBIDDING * scale / 2
        out = acc_ref[after, :dim, :] * jnp.where(none, 0, 1 / total)
        o_ref[...] = out.T.astype(o_ref.dtype)
