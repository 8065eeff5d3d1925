"""Tile sizes for the attention kernel, by predicted cycles, without a TPU: a search whose every candidate is compiled.

Candidates are jobs (`tpuvid.plan.candidate`), as many at a time as cores and memory allow. What each
found is kept in a journal in the user's cache folder, by shape, chip, versions and kernel source: a search that was
interrupted goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpuvid.compute.chips import Chip
from tpuvid.contract.options import Options
from tpuvid.errors import InputError, TpuvidError
from tpuvid.files.atomic import atomic_path, check_output
from tpuvid.files.cache_folder import cache_folder
from tpuvid.files.scratch import scratch_folder
from tpuvid.plan.bundles import dump_flags, no_time
from tpuvid.plan.jobs import Jobs, Task, jobs_at_once
from tpuvid.plan.topologies import Topology, require_libtpu

if TYPE_CHECKING:
    from tpuvid.compute.kernels.block_sizes import AttentionShape, Blocks, Row

JOB_BYTES = 4 * 2**30
"""Memory that a compile is granted: the largest seen took 2 GiB (2026-11)."""
COARSE = [
    (2048, 12288, 1024), (2048, 4096, 1024), (2304, 12288, 1024), (3072, 4096, 1024), (1024, 8192, 1024), (2048, 8192, 1024),
]  # fmt: skip
"""Where a search starts: the best of earlier searches (2026-11, v6e), and around."""
STRIDES = (1.5, 1.2, 1.08)
"""A search goes from the best of `COARSE` to neighbours larger or smaller by this, the next one where none is better."""


@dataclass(frozen=True, slots=True)
class Found:
    """What became of one candidate."""

    blocks: Blocks
    cycles: float | None
    """The cycles of the kernel; None where it can't be compiled with these blocks."""
    reason: str | None = None


@dataclass
class Journal:
    """One line of JSON per candidate; a line that a crash has cut off doesn't count."""

    path: Path
    key: dict[str, Any]
    found: dict[Blocks, Found] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from tpuvid.compute.kernels.block_sizes import Blocks

        for line in self.path.read_text("utf-8", errors="replace").splitlines() if self.path.exists() else ():
            with suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                if entry["key"] == self.key:
                    blocks = Blocks(*entry["blocks"])
                    self.found[blocks] = Found(blocks, entry["cycles"], entry["reason"])

    def add(self, found: Found) -> None:
        self.found[found.blocks] = found
        entry = {"key": self.key, "blocks": found.blocks, "cycles": found.cycles, "reason": found.reason}
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * _is_cut_off(self.path) + json.dumps(entry) + "\n")


def check_tunable(topology: Topology) -> None:
    """Raise `InputError` for a chip whose schedule gives no times, or where libtpu, which compiles for it, is missing.

    The order of such a chip's candidates isn't offered either: what is wrong about its bundle counts isn't known.
    """
    if reason := no_time(topology.chip):
        raise InputError(f"topology={topology.name!r}: {reason}; tune for v6e")
    require_libtpu()


def attention_shapes(model: str, topology: Topology, settings: Mapping[str, Any], mesh: str | None) -> list[AttentionShape]:
    """The calls of the kernel in one denoising step of `model`, on one device, each shape once.

    `settings` are those of `GenerationConfig` that differ from the model's defaults. Raises `InputError` for a model,
    settings or a mesh that can't be had.
    """
    from tpuvid.compute.kernels.block_sizes import AttentionShape

    options = Options(dtype="bfloat16", mesh=mesh).recorded()
    job = {"model": model, "topology": topology.name, "settings": dict(settings), "options": options}
    with scratch_folder() as scratch, Jobs(scratch) as jobs:
        jobs.start("shapes", "tpuvid.plan.programs:attention_calls", job, topology.environment())
        events = [event for _, event in jobs.events()]
    return [AttentionShape(*shape) for shape in events[-1]["result"]]


def tune_attention(
    shapes: Sequence[AttentionShape],
    topology: Topology,
    *,
    command: str,
    output: Path | None = None,
    jobs: int | None = None,
    max_candidates: int = 24,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Search blocks for each shape and write a row for each into `output` (None: the package's table).

    `command` is recorded with the rows. Raises `InputError` for a chip whose schedule gives no times, or where libtpu is
    missing or the table can't be written.
    """
    check_tunable(topology)
    from tpuvid.compute.kernels.block_sizes import TABLE, Row

    chip, at_once = topology.chip, jobs or jobs_at_once(JOB_BYTES)
    table = output or TABLE
    _check_table(table)
    journal_path = cache_folder("tune") / f"attention-{chip.name}.jsonl"
    rows = []
    for shape in shapes:
        journal = Journal(journal_path, {"chip": chip.device_kind, "shape": list(shape), **_versions()})
        say(f"{_say_shape(shape)} on {chip.name}: up to {max_candidates} candidates, {at_once} at a time")
        best = search(shape, journal, topology, at_once, max_candidates, say)
        rows.append(
            Row(
                chip=chip.device_kind,
                **shape._asdict(),
                **{f"block_{name}": size for name, size in best.blocks._asdict().items()},
                predicted_ms=round(_predicted_ms(best, chip), 3),
                jax=version("jax"),
                libtpu=version("libtpu"),
                date=time.strftime("%Y-%m-%d"),
                command=command,
            )
        )
        write_rows(table, rows[-1:])
    return rows


def search(
    shape: AttentionShape,
    journal: Journal,
    topology: Topology,
    jobs: int,
    limit: int,
    say: Callable[[str], None],
    evaluate: Callable[..., Iterator[Found]] | None = None,
) -> Found:
    """The best of at most `limit` candidates, those in the journal included: coarse first, then around the best."""
    tried: dict[Blocks, Found] = {}

    def best() -> Found | None:
        return min((f for f in tried.values() if f.cycles is not None), key=attrgetter("cycles"), default=None)

    def look_at(candidates: Sequence[Blocks]) -> None:
        new = [c for c in dict.fromkeys(candidates) if c not in tried][: limit - len(tried)]
        known = [journal.found[c] for c in new if c in journal.found]
        rest = [c for c in new if c not in journal.found]
        for found in chain(known, (evaluate or compile_candidates)(topology, shape, rest, jobs) if rest else ()):
            tried[found.blocks] = found
            if found.blocks not in journal.found:
                journal.add(found)
            say(_say_found(found, best(), len(tried), limit, topology))

    try:
        look_at([fit(shape, *sizes) for sizes in COARSE])
        strides = iter(STRIDES)
        stride: float | None = next(strides)
        while stride is not None and len(tried) < limit and (start := best()):
            look_at(_neighbours(shape, start.blocks, stride))
            if best() == start:
                stride = next(strides, None)
    except KeyboardInterrupt:
        say(f"interrupted; {len(tried)} candidates are kept in {journal.path}: the same command goes on from there")
        raise
    found = best()
    if found is None:
        raise TpuvidError(f"{_say_shape(shape)}: none of {len(tried)} candidates compiles; raise --max-candidates")
    return found


def fit(shape: AttentionShape, block_q: float, block_kv: float, compute: float) -> Blocks:
    """Blocks near these sizes, in whole lanes (queries: pairs), no longer than the sequences need; of the queries, the last
    block as full as the others. What is padded all the same costs cycles, and so counts by itself."""
    from tpuvid.compute.kernels.block_sizes import LANES, Blocks

    def whole(length: float) -> int:
        return math.ceil(length / LANES) * LANES

    q = 2 * whole(shape.queries / max(1, round(shape.queries / block_q)) / 2)  # the kernel works on 256 queries at a time
    kv_compute = min(max(1, round(compute / LANES)) * LANES, whole(shape.keys))
    parts = min(max(1, round(block_kv / kv_compute)), math.ceil(shape.keys / kv_compute))
    return Blocks(q, kv_compute * parts, kv_compute)


def _neighbours(shape: AttentionShape, blocks: Blocks, stride: float) -> list[Blocks]:
    q, kv, compute = blocks
    sizes = [
        (q * stride, kv, compute), (q, kv * stride, compute), (q, kv, compute / 2), (q / stride, kv, compute),
        (q, kv / stride, compute), (q, kv, compute * 2), (q / stride, kv * stride, compute),
    ]  # fmt: skip
    return [fit(shape, *s) for s in sizes]


def compile_candidates(topology: Topology, shape: AttentionShape, candidates: Sequence[Blocks], jobs: int) -> Iterator[Found]:
    """What became of each candidate, as it gets ready; `jobs` at a time."""
    with scratch_folder() as scratch, Jobs(scratch) as running:

        def tasks() -> Iterator[Task]:
            for number, blocks in enumerate(candidates):
                dump = scratch / f"dump-{number}"
                dump.mkdir()
                job = {"topology": topology.name, "shape": shape, "blocks": blocks, "dump": str(dump)}
                environment = topology.environment(dump_flags(dump))
                yield Task(str(number), "tpuvid.plan.candidate:count_cycles", job, environment)

        for name, event in running.run(tasks(), jobs):
            if "result" in event:
                yield Found(candidates[int(name)], **event["result"])


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to a table, each in the place of one for the same shape and chip."""
    new = {(row.chip, row.shape): row for row in rows}
    kept = [row for row in _read_table(path) if (row.chip, row.shape) not in new]
    lines = [json.dumps(row._asdict()) for row in sorted([*kept, *new.values()], key=lambda r: (r.chip, r.shape))]
    with atomic_path(path, overwrite=True) as temporary:
        temporary.write_text("[\n  " + ",\n  ".join(lines) + "\n]\n", "utf-8")


def _read_table(path: Path) -> list[Row]:
    from tpuvid.compute.kernels.block_sizes import read_rows

    try:
        return read_rows(path) if path.exists() else []
    except ValueError:
        raise InputError(
            f"{path}: is no table of block sizes; give --output a new file, or one that tpuvid tune wrote"
        ) from None


def _check_table(path: Path) -> None:
    from tpuvid.compute.kernels.block_sizes import TABLE, VARIABLE

    try:
        check_output(path, overwrite=True)
        if path.exists() and not os.access(path, os.W_OK):
            raise InputError(f"{path}: is not writable; choose another place")
    except InputError as error:
        if path != TABLE:
            raise
        raise InputError(f"{error}: pass --output FILE and set {VARIABLE}=FILE where the model runs") from None
    _read_table(path)


def _versions() -> dict[str, str]:
    """What a candidate's cycles depend on beside its shape."""
    source = Path(__file__).parents[1] / "compute" / "kernels" / "flash.py"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    return {"jax": version("jax"), "libtpu": version("libtpu"), "source": digest}


def _is_cut_off(path: Path) -> bool:
    return path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")


def _predicted_ms(found: Found, chip: Chip) -> float:
    """The predicted milliseconds of a candidate that fits."""
    assert found.cycles is not None and chip.clock_ghz is not None, "see `check_tunable`"
    return found.cycles / chip.clock_ghz / 1e6


def _say_shape(shape: AttentionShape) -> str:
    return f"attention {shape.heads} heads × {shape.queries} queries × {shape.keys} keys, D = {shape.head_dim}"


def _say_blocks(blocks: Blocks) -> str:
    return "/".join(map(str, blocks))


def _say_found(found: Found, best: Found | None, count: int, limit: int, topology: Topology) -> str:
    def ms(of: Found) -> str:
        return f"{_predicted_ms(of, topology.chip):.3g} ms"

    what = ms(found) if found.cycles is not None else f"does not fit ({(found.reason or '')[:100]})"
    top = f"; best {ms(best)} with {_say_blocks(best.blocks)}" if best else ""
    return f"[{count}/{limit}] {_say_blocks(found.blocks)}: {what}{top}"
