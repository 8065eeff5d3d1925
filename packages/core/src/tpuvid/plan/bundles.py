"""How long a Pallas kernel runs, predicted from the VLIW schedule that libtpu dumps; no TPU and no jax needed.

A TPU core issues one VLIW bundle per cycle while nothing stalls, and libtpu decides all of a kernel's bundles while it
compiles. So

    cycles = Σ over bundles of how often the bundle runs,    time = cycles / clock.

How often a bundle runs is the product, over the loops around it, of the trip count and of the share of trips in which
the predicated regions around it are entered:

- *Loops* end in a branch back to their head. The compiler marks the exit test; where it compares with a constant, that is
  the trip count. Mosaic runs a kernel's grid as one such loop, pipelined: a few trips more than there are grid steps, of
  which the first ones only fetch and the last ones only store.
- *Regions* are skipped by a branch forward. Its predicate is evaluated for every trip of the loop: the registers that hold
  the trip and the grid position are marked in the dump; sums, comparisons and logic over them, also through spills, are
  followed. `pl.when(pl.program_id(1) == 0)` is thereby counted exactly, as are the pipeline's prologue and epilogue.
- What depends on data (a block-sparse mask, a dynamic trip count) can't be known: such a region is counted as always
  entered, such a loop as run once, and their cycles are reported as `KernelSchedule.uncertain`. One exception: a region
  that makes up most of its loop is the kernel's work itself, behind a "has this block anything to do" test. It counts as
  always entered and as certain, which for a sparse mask is an upper bound. The other: a kernel whose name begins with
  "optimistic" says by that that such regions are for rare data (an exact fallback). They count as never entered.

Not counted: waiting for DMA (a kernel bound by HBM is slower than this says), the first fetch of a pipeline, the
interconnect, launching the kernel. Known check: JAX's splash attention for 5 heads, 75,600 tokens, D = 128, blocks
3328/2816/256 on v6e is predicted at 44.4 ms; published, measured: 43.93 ms. Only for v6e do such times agree with the
vendor's peak; where `Chip.clock_ghz` is None, cycles compare one kernel with another and mean no time.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tpuvid.compute.chips import Chip

BUNDLES = "final_bundles"
UTILISATION = "final_hlo-static-per-bundle-utilization"
BRANCH_DELAY = 4
"""Bundles after a branch that still run whether or not it is taken."""
PIPELINE_DEPTH = 3
"""The most trips beyond the grid's steps in Mosaic's pipelined loop (seen: 2; jax 0.10.2, libtpu 0.0.42, 2026-11)."""

OPTIMISTIC = "optimistic"
"""How the names of kernels begin whose data-dependent regions are seldom entered."""

Grid = tuple[int, ...]


def dump_flags(folder: Path) -> str:
    """Flags for LIBTPU_INIT_ARGS of the process that compiles, before it imports jax: the schedules go into `folder`."""
    return f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={BUNDLES}|{UTILISATION}"


@dataclass(frozen=True, slots=True)
class KernelSchedule:
    """One compiled Pallas kernel, per call."""

    name: str
    """The name of its custom call in the HLO, like "splash_mha_fwd_segmented_no_residuals.3"."""
    cycles: float
    bundles: int
    """The bundles as they stand in the program, each counted once."""
    utilisation: Mapping[str, float]
    """Share of the issue slots that are used, over all `cycles`, by unit: MXU, XLU, VALU, VPOP, EUP, VLOAD, VSTORE, SALU;
    "VLOAD:FILL" and "VSTORE:SPILL" are the loads and stores that registers overflowed into."""
    uncertain: float
    """The part of `cycles` in regions or loops whose frequency depends on data; 0 where the count is exact. For an
    optimistic kernel, the cycles that it would take more if it entered its regions always."""
    grid: Grid | None
    """The kernel's grid; None where there is no loop over it (a single step) or it could not be recovered."""

    def milliseconds(self, chip: Chip) -> float | None:
        """The time of a call; None on a chip whose clock isn't known: see `no_time`."""
        return None if chip.clock_ghz is None else self.cycles / chip.clock_ghz / 1e6


def no_time(chip: Chip) -> str | None:
    """Why cycles mean no time on this chip; None where they do."""
    if chip.clock_ghz is not None:
        return None
    return f"no times for {chip.name}: counted bundles exceed its published peak, so that its clock can't be relied on"


def kernels(folder: Path, grids: Mapping[str, Sequence[Grid]] | None = None) -> dict[str, KernelSchedule]:
    """Every Pallas kernel whose schedule lies in `folder`, by the HLO name of its custom call; fusions are passed over.

    Of two programs' kernels of the same name the later one counts: give each program a folder of its own.
    `grids`: by kernel name, as `pallas_grids` finds them; only needed where a grid can't be read off the schedule.
    """
    found = {}
    for _, path, table in dumped(folder):
        if (name := _kernel_name(path)) is not None:
            found[name] = read_schedule(name, path, table, grids)
    return found


def read_schedule(name: str, bundles: Path, table: Path, grids: Mapping[str, Sequence[Grid]] | None = None) -> KernelSchedule:
    """The schedule of the instruction `name`, whose files are `dumped`; `grids` as for `kernels`."""
    known = (grids or {}).get(re.sub(r"\.\d+$", "", name), ())
    return schedule(name, bundles.read_text(errors="replace"), table.read_text(), known)


def dumped(folder: Path) -> Iterator[tuple[str, Path, Path]]:
    """Each instruction with a schedule in `folder`: its name in the dump and the files of its bundles and of their slots."""
    for path in sorted(folder.glob(f"*-{BUNDLES}.txt")):
        label = re.fullmatch(rf"(\d+)-(.+)-\d+-{BUNDLES}\.txt", path.name)
        if label is None or label[2].endswith("schedule-analysis"):
            continue
        # the number is a time stamp: each program that was compiled has its own
        tables = [p for p in folder.glob(f"{label[1]}-*-{UTILISATION}.txt") if p.name.startswith(f"{label[1]}-{label[2]}-")]
        if len(tables) == 1:
            yield label[2], path, tables[0]


def pallas_grids(jaxpr: Any) -> dict[str, list[Grid]]:
    """The grid of each `pallas_call` in a jaxpr (as `jax.jit(f).trace(…).jaxpr` gives it), by the kernel's name in the HLO."""
    grids: dict[str, list[Grid]] = {}

    def walk(value: Any) -> None:
        if isinstance(value, (tuple, list)):
            for item in value:
                walk(item)
            return
        for equation in getattr(getattr(value, "jaxpr", value), "eqns", ()):
            if equation.primitive.name == "pallas_call":
                about = equation.params.get("name_and_src_info")
                name = re.sub(r"\W", "_", getattr(about, "name", None) or equation.params.get("name") or "kernel")
                grids.setdefault(name, []).append(tuple(equation.params["grid_mapping"].grid))
            for parameter in equation.params.values():
                walk(parameter)

    walk(jaxpr)
    return grids


_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(LH|LB|LE|PB|PF|CT)?\s*:\s*((?:> ?)*)\{(.*)")
_ENTRY = re.compile(r"/\* entry bundle: %(\S+) = custom-call\(")


def _kernel_name(path: Path) -> str | None:
    """The name of the custom call whose schedule a dump is; None for fusions. Reads no further than the first bundle."""
    with path.open(errors="replace") as lines:
        for line in lines:
            if _BUNDLE.match(line):
                entry = _ENTRY.search(line)
                return entry[1] if entry else None
    return None


def schedule(name: str, bundles: str, table: str, grids: Sequence[Grid] = ()) -> KernelSchedule:
    """Read the two texts that libtpu dumps of a kernel: its bundles, and one row per bundle of the slots that each uses."""
    units, capacity, used = _utilisation(table)
    program = _Program(bundles, grids)
    count = min(len(program.lines), len(used))
    weights, uncertain = program.frequencies()
    weights, uncertain, used = weights[:count], uncertain[:count], used[:count]
    doubtful = float(weights[uncertain].sum())
    if name.startswith(OPTIMISTIC):
        weights = np.where(uncertain, 0, weights)
    cycles = float(weights.sum())
    busy = weights @ used / capacity / cycles if cycles else np.zeros(len(units))
    return KernelSchedule(
        name=name,
        cycles=cycles,
        bundles=count,
        utilisation=dict(zip(units, busy.tolist(), strict=False)),
        uncertain=doubtful,
        grid=program.grid,
    )


def _utilisation(table: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Units, slots of each per bundle, and [bundles, units] slots used."""
    head, _, rows = table.partition("== UTILIZATION:\n")
    *_, names, capacity = head.strip().splitlines()
    used = np.array([row.split() for row in rows.splitlines() if row.strip()], float)
    return [n.strip() for n in names.split(",")], np.array(capacity.split(), float), used


@dataclass(frozen=True, slots=True)
class _Loop:
    start: int
    end: int
    trips: int | None
    """How often it runs; None where unknown."""


@dataclass(frozen=True, slots=True)
class _Region:
    """Bundles [start, end) that run in those trips of `loop` where `entered` is true; both None where that isn't known."""

    start: int
    end: int
    loop: _Loop | None
    entered: np.ndarray | None


_Value = tuple[_Loop | None, Any]
"""What a register holds in each trip of a loop [trips], or a constant, of no loop."""

_REGISTER = r"%([sp]\d+(?:_[sp]\d+)?)"
_DEFINITION = re.compile(_REGISTER + r" = ([a-z][\w.]*)([^;{}]*)")
_SPILL = re.compile(r"= sst \[smem:\[(#allocation\d+_spill)\](?: \+ (\$0x[0-9a-f]+))?\] " + _REGISTER)
_FILL = re.compile(r"\[smem:\[(#allocation\d+_spill)\](?: \+ (\$0x[0-9a-f]+))?\]")
_BRANCH = re.compile(r"sbr\.\w+ (?:\((!?)" + _REGISTER + r"\) )?target = \$region(\d+)")
_POSITION = re.compile(r"iteration index, stage = (\d+)(?: iter bound = (\d+))?")
_COMMENT = re.compile(r"/\*.*?\*/")
_NOISE = re.compile(r"/\*.*?\*/|\(!?%p\w+\)")
"""Comments, and the predicate under which an instruction runs: registers have one definition, whether or not it ran."""
_COMPARE = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}
_LOGIC: dict[str, Callable] = {
    "pand": np.logical_and,
    "por": np.logical_or,
    "pxor": np.logical_xor,
    "pnand": lambda a, b: ~np.logical_and(a, b),
    "pnor": lambda a, b: ~np.logical_or(a, b),
}
_UNKNOWN_DEPTH = 40


@dataclass(frozen=True, slots=True)
class _Definition:
    line: int
    operation: str
    operands: list[str]
    comment: str


class _Program:
    """The bundles of one kernel: its loops, its regions, and what its scalar registers hold where that can be followed."""

    def __init__(self, text: str, grids: Sequence[Grid] = ()):
        found = [m for m in map(_BUNDLE.match, text.splitlines()) if m]
        self.lines = [m[3] for m in found]
        self._heads = [i for i, m in enumerate(found) if m[1] == "LB"]
        self._depths = [m[2].count(">") for m in found]
        self._labels: dict[str, int] = {}
        self._definitions: dict[str, list[_Definition]] = {}
        self._spills: dict[tuple[str, str | None], list[tuple[int, str]]] = {}
        self._branches: list[tuple[int, bool, str | None, str]] = []
        for i, line in enumerate(self.lines):
            self._read(i, line)
        self.loops = list(self._find_loops())
        self.grid = self._find_grid(grids)
        self.regions = list(self._find_regions())

    def _read(self, i: int, line: str) -> None:
        if "region " in line:
            for m in re.finditer(r"Start(?:/End empty)? region (\d+)", line):
                self._labels.setdefault(m[1], i)
        if "%s" in line or "%p" in line:
            for m in _DEFINITION.finditer(line):
                comment = " ".join(_COMMENT.findall(m[3]))
                operands = [x for x in (x.strip() for x in _NOISE.sub("", m[3]).split(",")) if x]
                self._definitions.setdefault(m[1], []).append(_Definition(i, m[2], operands, comment))
        if "_spill" in line:
            for m in _SPILL.finditer(line):
                self._spills.setdefault((m[1], m[2]), []).append((i, m[3]))
        if "sbr." in line:
            self._branches += [(i, m[1] == "!", m[2], m[3]) for m in _BRANCH.finditer(line)]

    def frequencies(self) -> tuple[np.ndarray, np.ndarray]:
        """[bundles] how often each runs per call, and whether that is a guess."""
        size = len(self.lines)
        weights, uncertain = np.ones(size), np.zeros(size, bool)
        spans: list[_Loop | _Region] = [*self.loops, *self.regions]
        cuts = sorted({0, size, *(s.start for s in spans), *(s.end for s in spans)})
        for start, end in pairwise(cuts):
            loops = [x for x in self.loops if x.start <= start < x.end]
            regions = [x for x in self.regions if x.start <= start < x.end]
            weight: float = math.prod(x.trips or 1 for x in loops)
            for loop in {x.loop for x in regions if x.entered is not None}:
                entered = [x.entered for x in regions if x.entered is not None and x.loop == loop]
                weight *= float(np.mean(np.logical_and.reduce(np.broadcast_arrays(*entered))))
            weights[start:end] = weight
            uncertain[start:end] = any(x.trips is None for x in loops) or any(
                x.entered is None and not self._is_body(x) for x in regions
            )
        return weights, uncertain

    def _is_body(self, region: _Region) -> bool:
        """Whether a region is most of what the loop around it does, or most of a kernel that has no loop."""
        around = [x for x in self.loops if x.start <= region.start and region.end <= x.end and x.start != region.start]
        start, end = min(((x.start, x.end) for x in around), key=lambda x: x[1] - x[0], default=(0, len(self.lines)))
        return region.end - region.start > (end - start) / 2

    def _loop_at(self, i: int) -> _Loop | None:
        around = [x for x in self.loops if x.start <= i < x.end]
        return min(around, key=lambda x: x.end - x.start, default=None)

    def _find_loops(self) -> Iterator[_Loop]:
        back = {}
        for i, _, predicate, region in self._branches:
            target = self._labels.get(region)
            if target is not None and target <= i:
                back[target] = (i, predicate)
        for head in self._heads:
            if head in back:
                branch, predicate = back[head]
                yield _Loop(head, min(branch + 1 + BRANCH_DELAY, len(self.lines)), self._trips(predicate))
            else:
                deeper = (i for i in range(head, len(self.lines)) if 0 < self._depths[i] < self._depths[head])
                yield _Loop(head, next(deeper, len(self.lines)), None)

    def _trips(self, predicate: str | None) -> int | None:
        """Trips by an exit test: the counter's next value against a constant; the counter is the phi of its start and that."""
        test = self._define(predicate)
        if test is None or "loop exit test" not in test.comment or not test.operation.startswith("scmp.ge"):
            return None
        register, bound = test.operands
        step = self._define(register.lstrip("%"))
        if not bound.isdigit() or step is None or step.operation != "sadd.s32":
            return None
        sizes = [_integer(x) for x in step.operands]
        phi = next((self._origin(x[1:], step.line) for x in step.operands if x.startswith("%")), None)
        size = next((x for x in sizes if x is not None), None)
        if phi is None or not phi.operation.startswith("sphi") or not size or size < 0:
            return None
        start = self._define(phi.operands[0].lstrip("%"))
        first = _integer(start.operands[0]) if start is not None and start.operation == "smov" else None
        return None if first is None else max(1, math.ceil((int(bound) - first) / size))

    def _find_grid(self, grids: Sequence[Grid]) -> Grid | None:
        """The grid whose steps the outermost loop counts: each coordinate wraps where it reaches its bound, innermost first."""
        outer = self._outermost()
        if outer is None or outer.trips is None:
            return None
        phis = [d for d in self._all() if d.operation.startswith("sphi") and outer.start <= d.line < outer.end]
        dimensions = {int(m[2]) for d in phis for m in _POSITION.finditer(d.comment) if m[2]}
        steps = range(outer.trips, outer.trips - PIPELINE_DEPTH - 1, -1)
        if not dimensions:
            return None
        wraps = [
            int(d.operands[1])
            for d in self._all()
            if d.operation.startswith("scmp.ge") and outer.start <= d.line < outer.end and d.operands[-1].isdigit()
        ][: max(dimensions) + 1]
        read = tuple(reversed(wraps))
        if len(read) == max(dimensions) + 1 and math.prod(read) in steps:
            return read
        return next((tuple(g) for g in grids if len(g) == max(dimensions) + 1 and math.prod(g) in steps), None)

    def _outermost(self) -> _Loop | None:
        return max(self.loops, key=lambda x: x.end - x.start, default=None)

    def _find_regions(self) -> Iterator[_Region]:
        for i, negated, predicate, label in self._branches:
            start, end = i + 1 + BRANCH_DELAY, self._labels.get(label)
            if end is None or end <= start:
                continue
            skipped = (None, True) if predicate is None else self._evaluate(predicate, i)
            if skipped is None:
                yield _Region(start, end, None, None)
            else:
                loop, value = skipped
                yield _Region(start, end, loop, np.asarray(value if negated else np.logical_not(value)))

    def _evaluate(self, register: str, line: int, depth: int = 0) -> _Value | None:
        """What a register holds, read at bundle `line`; None where that can't be followed."""
        definition = self._define(register)
        if definition is None or depth > _UNKNOWN_DEPTH:
            return None
        operation, operands = definition.operation.split(".")[0], definition.operands

        def value(text: str) -> _Value | None:
            if (constant := _integer(text)) is not None:
                return None, constant
            negated, text = text.startswith("!"), text.lstrip("!%")
            found = self._evaluate(text, definition.line, depth + 1)
            return (found[0], np.logical_not(found[1])) if found and negated else found

        if operation == "sphi":
            return self._position(definition)
        if operation == "sld":
            stored = self._stored(operands, line)
            return self._evaluate(stored[1], stored[0], depth + 1) if stored else None
        if operation in ("smov", "pmov", "pneg") and len(operands) == 1:
            found = value(operands[0])
            return (found[0], np.logical_not(found[1])) if found and operation == "pneg" else found
        combine = {"sadd": operator.add, "ssub": operator.sub, **_LOGIC}.get(operation)
        if operation == "scmp":
            combine = _COMPARE.get(definition.operation.split(".")[1])
        if combine is None or len(operands) != 2:
            return None
        a, b = value(operands[0]), value(operands[1])
        if a is None or b is None or (a[0] and b[0] and a[0] != b[0]):
            return None
        return a[0] or b[0], combine(a[1], b[1])

    def _position(self, phi: _Definition) -> _Value | None:
        """The trip of a loop, or the coordinate in the grid that a pipeline's stage has reached in each trip."""
        loop = self._loop_at(phi.line)
        if loop is None or loop.trips is None:
            return None
        trip = np.arange(loop.trips)
        marked = _POSITION.search(phi.comment)
        if marked is None:
            return None
        step = trip - int(marked[1])
        if marked[2] is None:
            return loop, step
        if self.grid is None or loop != self._outermost():
            return None
        return loop, np.unravel_index(np.clip(step, 0, math.prod(self.grid) - 1), self.grid)[int(marked[2])]

    def _stored(self, operands: list[str], line: int) -> tuple[int, str] | None:
        """What a load fills a register with again, and where that was spilled: the last store above, or else (carried
        around the loop) the last one of all."""
        slot = _FILL.search(operands[0])
        stores = self._spills.get((slot[1], slot[2])) if slot else None
        if not stores:
            return None
        return ([s for s in stores if s[0] <= line] or stores)[-1]

    def _origin(self, register: str, line: int) -> _Definition | None:
        """The definition of a register, or of the one that it is a fill of."""
        found = self._define(register)
        if found is not None and found.operation == "sld":
            stored = self._stored(found.operands, line)
            return self._define(stored[1]) if stored else None
        return found

    def _define(self, register: str | None) -> _Definition | None:
        found = self._definitions.get(register or "")
        return found[0] if found else None

    def _all(self) -> Iterable[_Definition]:
        """All definitions in the program's order."""
        return sorted((d for ds in self._definitions.values() for d in ds), key=lambda d: d.line)


def _integer(text: str) -> int | None:
    """An immediate operand; 4294967295 stands for −1."""
    if not text.isdigit():
        return None
    return int(text) - 2**32 if int(text) >= 2**31 else int(text)
