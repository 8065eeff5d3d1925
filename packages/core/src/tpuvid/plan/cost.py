"""What one run of a compiled program takes on a TPU, from its scheduled HLO. Imports neither jax nor torch.

The model, with nothing fitted to a measurement:

- **Core.** An instruction takes the longest of its cycles over the clock, of its HBM bytes over HBM's bandwidth, and of its
  FLOPs over the bf16 peak. Cycles are those of its VLIW schedule (bundles × grid steps) where the caller has counted them:
  `schedule_cycles`, by instruction, for Pallas kernels and XLA's own fusions alike (`tpuvid.plan.schedules`). For other
  instructions they are XLA's `estimated_cycles`, which serve it to choose tile sizes: for passes over HBM they are 2 to 7 times
  what schedule and bandwidth say, so `Part.estimated_seconds` tells how much rests on them. A Pallas kernel without a schedule
  can't be priced.
- **HBM bytes.** What an instruction reads and writes outside VMEM (layouts without ``S(1)``), padded to tiles: of an operand
  that is only sliced the slices, of a result that is updated in place the update. Each counts once: tiles that a matmul or a
  kernel fetches again are left out, so these bytes are the least that move.
- **Loops.** The body's time × its trip count.
- **Overlap.** Instructions run in the order of the text. What a ``-start`` begins takes its time beside the instructions that
  follow, one transfer after the other; its ``-done`` waits for what remains. A collective without that pair stops the core, one
  inside a fusion runs beside it. Transfers between HBM and VMEM don't slow the core's own traffic.
- **Interconnect.** `tpuvid.plan.links`.
- **FLOPs.** 2 per multiply-add of dots and convolutions, by their shapes × trip counts, taps that fall into padding or between
  dilated elements left out; of attention kernels by the shapes that they get, padding included.

Left out: DMA latencies, refetched tiles, contention for HBM (a collective's own reads and writes too), the host's dispatch, and
throttling. Every branch of a conditional counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from tpuvid.plan import hlo
from tpuvid.plan.flops import MULTIPLIES, kernel_flops, multiply_flops
from tpuvid.plan.links import Coords, collective_cost
from tpuvid.plan.topologies import Topology

PARTS = ("attention", "matmul", "elementwise", "collectives", "other")
"""attention: Pallas kernels; matmul: what contains a dot or a convolution, with all that is fused into it; elementwise: norms,
modulation, activations; collectives: what of them nothing hides; other: copies, padding, waits for transfers to VMEM."""

FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id opt-barrier add-dependency".split()
)
MOVES = FREE | frozenset(
    "copy transpose reshape broadcast slice dynamic-slice dynamic-update-slice pad concatenate reverse iota gather".split()
)
"""Opcodes that only move data."""

KERNEL = "tpu_custom_call"


@dataclass(frozen=True)
class Part:
    seconds: float | None
    hbm_bound_seconds: float | None
    """The part of `seconds` in instructions that HBM's bandwidth holds up."""
    estimated_seconds: float | None
    """The part of `seconds` that XLA estimates, for want of a counted schedule."""
    flops: float
    """FLOPs per device."""
    hbm_bytes: float
    """Bytes per device; the least that move."""


@dataclass(frozen=True)
class Collective:
    """One instruction of the program, over all its runs."""

    kind: str
    name: str
    op_name: str
    """Where it comes from in the traced program."""
    group: int
    """Devices that work together."""
    count: int
    bytes: int
    """Bytes per device and run: what is reduced, exchanged or sent; of an all-gather its result."""
    sent_bytes: float
    """Bytes that a device sends in one run."""
    seconds: float
    """The seconds of all runs, before overlap."""
    exposed_seconds: float | None
    """The part of `seconds` in which the core waits."""


@dataclass(frozen=True)
class Prediction:
    """One run of a program on one slice."""

    topology: str
    seconds: float | None
    reason: str | None
    """Why there are no seconds."""
    parts: Mapping[str, Part]
    """The parts by their names in `PARTS`."""
    collectives: tuple[Collective, ...]
    flops: float
    """FLOPs that each device executes, padding included."""
    hbm_bytes: float
    share_of_peak: float | None
    """`flops` over what the chip could execute in `seconds`: an MFU that counts executed rather than useful work."""
    notes: tuple[str, ...] = ()
    """What is not in the figures."""

    @property
    def collective_seconds(self) -> float:
        """The seconds of all collectives, before overlap."""
        return sum(c.seconds for c in self.collectives)

    def to_dict(self) -> dict[str, Any]:
        """The prediction, JSON-ready."""
        return asdict(self) | {"collective_seconds": self.collective_seconds}


def predict(
    program: str | hlo.Module,
    topology: Topology,
    *,
    coords: Sequence[Coords] = (),
    schedule_cycles: Mapping[str, float] | None = None,
    kernel_flops: Mapping[str, float] | None = None,
) -> Prediction:
    """The cost of one run of `program`, a compiled program's text or what `hlo.parse` made of it.

    `coords`: of the chip of each device of the program's mesh, in order (JAX: ``[d.coords for d in mesh.devices.flat]``);
    needed where it has collectives. `schedule_cycles`: by instruction, cycles of all its grid steps. `kernel_flops`: by
    instruction, of Pallas kernels whose operands don't begin with attention's query, key and value.

    On a chip whose clock isn't known there are no seconds, but FLOPs, bytes and what collectives take. Raises `ValueError` for
    text that isn't a scheduled program, and for collectives without the `coords` of all devices or of a kind that has no model.
    """
    module = hlo.parse(program) if isinstance(program, str) else program
    pricer = _Pricer(module, topology, coords, schedule_cycles or {}, kernel_flops or {})
    total = pricer.run(module.entry, 1)
    parts = {name: tally.part(pricer.clock is not None) for name, tally in pricer.tallies.items()}
    flops = sum(part.flops for part in parts.values())
    reason = None
    if pricer.clock is None:
        reason = (
            f"{topology.chip.name}: its clock isn't known (schedules would run faster than its peak), so cycles give no seconds"
        )
    elif pricer.unpriced:
        reason = f"no schedule was counted of the Pallas kernels {', '.join(sorted(pricer.unpriced))}"
    seconds = None if reason else total
    return Prediction(
        topology=topology.name,
        seconds=seconds,
        reason=reason,
        parts=parts,
        collectives=tuple(c.result(pricer.clock is not None) for c in pricer.collectives.values()),
        flops=flops,
        hbm_bytes=sum(part.hbm_bytes for part in parts.values()),
        share_of_peak=flops / (seconds * topology.chip.bf16_tflops * 1e12) if seconds else None,
        notes=tuple(pricer.notes),
    )


@dataclass
class _Tally:
    seconds: float = 0.0
    hbm_bound: float = 0.0
    estimated: float = 0.0
    flops: float = 0.0
    hbm_bytes: float = 0.0

    def part(self, timed: bool) -> Part:
        if not timed:
            return Part(None, None, None, self.flops, self.hbm_bytes)
        return Part(self.seconds, self.hbm_bound, self.estimated, self.flops, self.hbm_bytes)


@dataclass
class _Runs:
    """All runs of one collective."""

    kind: str
    instruction: hlo.Instruction
    group: int
    bytes: int
    sent: float
    each: float
    """Seconds of one run."""
    count: int = 0
    exposed: float = 0.0

    def result(self, timed: bool) -> Collective:
        i = self.instruction
        return Collective(
            kind=self.kind,
            name=i.name,
            op_name=i.op_name,
            group=self.group,
            count=self.count,
            bytes=self.bytes,
            sent_bytes=self.sent,
            seconds=self.each * self.count,
            exposed_seconds=self.exposed if timed else None,
        )


@dataclass
class _Pending:
    """A transfer that runs beside the core."""

    ends: float
    part: str
    runs: _Runs | None = None


@dataclass
class _Pricer:
    module: hlo.Module
    topology: Topology
    coords: Sequence[Coords]
    schedule_cycles: Mapping[str, float]
    kernel_flops: Mapping[str, float]
    tallies: dict[str, _Tally] = field(default_factory=lambda: {name: _Tally() for name in PARTS})
    collectives: dict[str, _Runs] = field(default_factory=dict)
    unpriced: set[str] = field(default_factory=set)
    notes: dict[str, None] = field(default_factory=dict)
    """The notes in order, each once."""
    _bodies: dict[str, int] = field(default_factory=dict)

    @cached_property
    def cycles_of_code(self) -> dict[int, float]:
        """The counted schedules by what they are of: libtpu compiles instructions that do the same only once."""
        known = ((c, i) for c in self.module.computations.values() for i in c if i.name in self.schedule_cycles)
        return {self.code(c, i): self.schedule_cycles[i.name] for c, i in known}

    def code(self, computation: hlo.Computation, instruction: hlo.Instruction) -> int:
        """A hash of what `instruction` does, alike for those that differ only in names and origin."""
        inside = tuple(self._body(called.name) for called in self.module.called(instruction))
        operands = tuple(operand.outputs for operand in computation.operands(instruction))
        return hash((instruction.opcode, instruction.outputs, operands, inside, instruction.own_attributes))

    def _body(self, name: str) -> int:
        if name not in self._bodies:
            computation = self.module.computations[name]
            number = {inner: n for n, inner in enumerate(computation.instructions)}
            places = [tuple(number[operand] for operand in i.operands) or i.literal for i in computation]
            steps = [self.code(computation, i) for i in computation]
            self._bodies[name] = hash((*places, *steps, number[computation.root]))
        return self._bodies[name]

    @property
    def clock(self) -> float | None:
        """The clock in Hz."""
        return self.topology.chip.clock_ghz and self.topology.chip.clock_ghz * 1e9

    def run(self, computation: hlo.Computation, times: int) -> float:
        """Seconds of one run of `computation`; what it does counts `times` over."""
        now, free = 0.0, {"links": 0.0, "hbm": 0.0}
        pending: dict[str, _Pending] = {}
        for instruction in computation:
            opcode, first = instruction.opcode, next(iter(instruction.operands), "")
            if opcode in FREE:
                continue
            if opcode == "while":
                trips = self.module.trip_count(instruction)
                if trips is None:
                    self.notes[f"{instruction.name}: a loop of unknown length counts once"] = None
                now += (trips or 1) * self.run(self.module.body(instruction), times * (trips or 1))
            elif opcode in ("call", "conditional"):
                now += sum(self.run(called, times) for called in self.module.called(instruction))
            elif opcode.endswith("-update") and first in pending:
                pending[instruction.name] = pending.pop(first)
            elif opcode.endswith("-done"):
                if transfer := pending.pop(first, None):
                    waits = max(0.0, transfer.ends - now)
                    now += waits
                    self._wait(transfer, waits, times)
            elif (runs := self._collective(computation, instruction)) is not None:
                runs.count += times
                free["links"] = max(now, free["links"]) + runs.each
                transfer = _Pending(free["links"], "collectives", runs)
                if runs.instruction.opcode.endswith("-start") or opcode == "async-start":
                    pending[instruction.name] = transfer
                else:
                    now += self._execute(computation, instruction, times) if opcode == "fusion" else 0.0
                    waits = max(0.0, transfer.ends - now)
                    now += waits
                    self._wait(transfer, waits, times)
            elif opcode.endswith("-start"):
                moved = _moved_bytes(instruction)
                self.tallies["other"].hbm_bytes += moved * times
                free["hbm"] = max(now, free["hbm"]) + moved / (self.topology.chip.hbm_gb_per_s * 1e9)
                pending[instruction.name] = _Pending(free["hbm"], "other")
            else:
                now += self._execute(computation, instruction, times)
        return now

    def _wait(self, transfer: _Pending, seconds: float, times: int) -> None:
        self.tallies[transfer.part].seconds += seconds * times
        if transfer.runs:
            transfer.runs.exposed += seconds * times
        else:
            self.tallies[transfer.part].hbm_bound += seconds * times

    def _collective(self, computation: hlo.Computation, instruction: hlo.Instruction) -> _Runs | None:
        """What `instruction` is, starts or, as a fusion, contains of collectives."""
        found = (computation, instruction) if instruction.collective else None
        if found is None:
            if instruction.opcode not in ("fusion", "async-start"):
                return None
            inner = ((c, i) for c in self.module.called(instruction) for i in c if i.collective)
            found = next(inner, None)
            if found is None:
                return None
        if len(self.coords) != self.module.devices:
            raise ValueError(f"coords of {len(self.coords)} devices; the program has collectives of {self.module.devices}")
        computation, collective = found
        kind = collective.collective
        assert kind is not None, "it was chosen for that"
        if collective.name not in self.collectives:
            members = collective.pairs() or collective.groups(self.module.devices)
            size = len(members[0])
            arrays = [a for operand in computation.operands(collective) for a in operand.outputs if a.shape]
            if kind == "collective-permute":
                arrays = arrays[:1]  # the others say where to write
            payload = sum(a.bytes for a in arrays) * (size if kind == "all-gather" else 1)
            each, sent = collective_cost(kind, payload, members, self.coords, self.topology)
            self.collectives[collective.name] = _Runs(kind, collective, size, payload, sent, each)
        return self.collectives[collective.name]

    def _execute(self, computation: hlo.Computation, instruction: hlo.Instruction, times: int) -> float:
        """Seconds of one run on the core; counts it `times` over."""
        part = self._part(computation, instruction)
        tally = self.tallies[part]
        flops = self._flops(computation, instruction)
        tally.flops += flops * times
        moved = self._hbm_bytes(computation, instruction)
        tally.hbm_bytes += moved * times
        if self.clock is None:
            return 0.0
        scheduled = self.schedule_cycles.get(instruction.name)
        if scheduled is None:
            scheduled = self.cycles_of_code.get(self.code(computation, instruction))
        if scheduled is None and part == "attention":
            self.unpriced.add(instruction.name)
        cycles = scheduled if scheduled is not None else instruction.estimated_cycles or 0
        computing = max(cycles / self.clock, flops / (self.topology.chip.bf16_tflops * 1e12))
        streaming = moved / (self.topology.chip.hbm_gb_per_s * 1e9)
        seconds = max(computing, streaming)
        tally.seconds += seconds * times
        if streaming >= computing:
            tally.hbm_bound += seconds * times
        elif scheduled is None:
            tally.estimated += seconds * times
        return seconds

    def _part(self, computation: hlo.Computation, instruction: hlo.Instruction) -> str:
        if instruction.target == KERNEL:
            return "attention"
        opcodes = {i.opcode for _, i in self._inside(computation, instruction)}
        if opcodes & set(MULTIPLIES):
            return "matmul"
        return "other" if opcodes <= MOVES or instruction.opcode == "custom-call" else "elementwise"

    def _inside(
        self, computation: hlo.Computation, instruction: hlo.Instruction
    ) -> Iterator[tuple[hlo.Computation, hlo.Instruction]]:
        """`instruction`, or what a fusion is made of, fusions within it too."""
        if instruction.opcode != "fusion":
            yield computation, instruction
            return
        for called in self.module.called(instruction):
            for inner in called:
                yield from self._inside(called, inner)

    def _flops(self, computation: hlo.Computation, instruction: hlo.Instruction) -> float:
        if instruction.target == KERNEL:
            if instruction.name in self.kernel_flops:
                return self.kernel_flops[instruction.name]
            flops = kernel_flops(computation, instruction)
            if flops is None:
                self.notes[f"{instruction.name}: the FLOPs of this kernel aren't known"] = None
            return flops or 0.0
        inside = self._inside(computation, instruction)
        return sum(multiply_flops(*found) for found in inside if found[1].opcode in MULTIPLIES)

    def _hbm_bytes(self, computation: hlo.Computation, instruction: hlo.Instruction) -> int:
        if instruction.opcode != "fusion":
            single = {instruction.name: instruction}
            for number, operand in enumerate(computation.operands(instruction)):
                single[operand.name] = hlo.Instruction(operand.name, "parameter", operand.outputs, (), (), "", str(number))
            inner = hlo.Computation("", single, instruction.name)
        else:
            inner = self.module.called(instruction)[0]
        read = 0
        for number, operand in enumerate(computation.operands(instruction)):
            if any(array.hbm_bytes for array in operand.outputs) and number in inner.parameters:
                whole = sum(array.hbm_bytes for array in operand.outputs)
                read += min(whole, self._used_bytes(inner, inner.parameters[number]))
        return read + self._written_bytes(inner, inner.instructions[inner.root], instruction.outputs)

    def _used_bytes(self, computation: hlo.Computation, value: hlo.Instruction) -> int:
        """The bytes of `value` that its users read."""
        used = 0
        for user in computation.users[value.name]:
            place = user.operands.index(value.name)
            size = sum(array.bytes for array in user.outputs)
            match user.opcode:
                case "slice" | "gather":
                    used += size
                case "dynamic-slice" if place == 0:
                    used += size
                case "dynamic-update-slice" if place == 0:
                    pass  # in place
                case "bitcast":
                    used += self._used_bytes(computation, user)
                case "fusion":
                    inner = self.module.called(user)[0]
                    used += self._used_bytes(inner, inner.parameters[place])
                case _:
                    return sum(array.bytes for array in value.outputs)
        return used

    def _written_bytes(self, computation: hlo.Computation, root: hlo.Instruction, outputs: Sequence[hlo.Array]) -> int:
        """The bytes written to `outputs`, where `root` makes them."""
        if not any(array.hbm_bytes for array in outputs):
            return 0
        if root.opcode == "tuple":
            makers = computation.operands(root)
            return sum(self._written_bytes(computation, maker, [array]) for maker, array in zip(makers, outputs, strict=False))
        if root.opcode == "bitcast":
            return self._written_bytes(computation, computation.operands(root)[0], outputs)
        if root.opcode == "dynamic-update-slice":
            return sum(array.bytes for array in computation.operands(root)[1].outputs)
        return sum(array.hbm_bytes for array in outputs)


def _moved_bytes(start: hlo.Instruction) -> int:
    """The bytes of HBM that a transfer moves: what arrives, once for each side that is in HBM."""
    arrays = [array for array in start.outputs if array.shape]
    if not arrays:
        return 0
    return min(array.bytes for array in arrays) * sum(array.space == hlo.HBM for array in arrays[:2])
