"""A compiled program's scheduled HLO text, parsed as far as its cost asks. Imports neither jax nor torch.

The text is what ``Compiled.as_text()`` gives for a TPU: the order of a computation's instructions is the order of execution,
an array's layout names its memory (``S(1)`` is VMEM) and its tiles, and the compiler's own figures stand in ``backend_config``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

HBM, VMEM = 0, 1
"""Memory spaces of a layout; others hold semaphores and scalars."""

BITS = {"pred": 8, "token": 0, "opaque": 0, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "c64": 64, "c128": 128}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_ARRAY = re.compile(r"(\w+)\[([\d,<=?]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?(\S+) = ")
_COMMENT = re.compile(r"/\*.*?\*/")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|(?:branch|true|false|called)_computations?)=(\{[^}]*\}|%?[^\s,]+)")
_ORIGIN = re.compile(
    _CALLED.pattern + r"|\bchannel_id=\d+|metadata=\{[^}]*\}|control-predecessors=\{[^}]*\}|kernel_metadata=\{[^}]*\}"
)
_NAME = re.compile(r"%([^\s,(){}]+)")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")


@dataclass(frozen=True, slots=True)
class Array:
    """One array that an instruction gives or takes."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    """The size as it lies in memory: padded to whole tiles."""
    space: int = HBM

    @property
    def hbm_bytes(self) -> int:
        return self.bytes if self.space == HBM else 0


@dataclass(frozen=True, slots=True)
class Instruction:
    name: str
    opcode: str
    outputs: tuple[Array, ...]
    """The leaves, where it gives a tuple."""
    operands: tuple[str, ...]
    called: tuple[str, ...]
    """Computations: of a while, its condition and its body, in the order of the text."""
    attributes: str
    """What follows the operands."""
    literal: str
    """What stands between the parentheses: the value of a constant, the number of a parameter."""

    @property
    def op_name(self) -> str:
        """Where it comes from in the traced program."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    @property
    def estimated_cycles(self) -> int | None:
        """The cycles by XLA's cost model, which chooses tile sizes by it."""
        found = self.attribute(r'"estimated_cycles":"(\d+)"')
        return None if found is None else int(found)

    @property
    def target(self) -> str | None:
        """The target of a custom call; "tpu_custom_call" is a Pallas kernel."""
        return self.attribute(r'custom_call_target="([^"]*)"')

    @property
    def collective(self) -> str | None:
        """Which of `COLLECTIVES` it is or starts."""
        kind = self.opcode.removesuffix("-start")
        return kind if kind in COLLECTIVES else None

    @property
    def own_attributes(self) -> str:
        """The attributes without the names of others, of channels and of its origin."""
        return _ORIGIN.sub("", self.attributes)

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    def dims(self, name: str) -> tuple[int, ...]:
        """The numbers in an attribute such as ``dimensions={0,2}``; empty where it is missing."""
        found = self.attribute(rf"\b{name}=\{{([\d,]*)\}}")
        return tuple(map(int, filter(None, (found or "").split(","))))

    def pairs(self) -> list[tuple[int, int]]:
        """(source, target) of a collective-permute, by place in the mesh."""
        found = self.attribute(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}") or ""
        return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", found)]

    def groups(self, devices: int) -> list[list[int]]:
        """The places in the mesh that work together in a collective; all `devices` where it names none.

        Raises `ValueError` for a form that isn't known.
        """
        found = re.search(r"replica_groups=(\{(?:\{[\d,]*\},?)*\}|\[[^ ]*|mesh\[[^\]]*\] ?\{[^}]*\})", self.attributes)
        if found is None:
            return [list(range(devices))]
        text = found[1].rstrip(",")
        if text.startswith("{"):
            groups = [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]
            return groups or [list(range(devices))]
        if iota := re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
            shape, source = _ints(iota[1]), _ints(iota[2])
            order = _ints(iota[3]) if iota[3] else tuple(range(len(source)))
            return _chunks(_transposed_iota(source, order), shape[-1])
        if axes := re.fullmatch(r"mesh\[((?:'[^']+'=\d+,?)+)\] ?\{((?:'[^']+',?)*)\}", text):
            sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes[1])}
            names, within = list(sizes), re.findall(r"'([^']+)'", axes[2])
            order = tuple(names.index(name) for name in [*(n for n in names if n not in within), *within])
            return _chunks(_transposed_iota(tuple(sizes.values()), order), math.prod(sizes[name] for name in within))
        raise ValueError(f"{self.name}: replica groups of an unknown form: {text}")


@dataclass(frozen=True)
class Computation:
    name: str
    instructions: Mapping[str, Instruction]
    """The instructions by name, in order."""
    root: str

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return users

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.literal): i for i in self.instructions.values() if i.opcode == "parameter"}

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())


@dataclass(frozen=True)
class Module:
    computations: Mapping[str, Computation]
    entry: Computation = field(repr=False)
    devices: int = 1
    """The number of devices that the program runs on together."""

    def called(self, instruction: Instruction) -> list[Computation]:
        return [self.computations[name] for name in instruction.called if name in self.computations]

    def body(self, loop: Instruction) -> Computation:
        return self.computations[loop.attribute(r"\bbody=%?([^\s,]+)") or ""]

    def trip_count(self, loop: Instruction) -> int | None:
        """The trips of a while, by the compiler's note or its condition ``i < constant``, where JAX's loops count from zero
        by one; None where neither tells."""
        if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        condition = self.computations[loop.attribute(r"\bcondition=%?([^\s,]+)") or ""]
        test = condition.instructions[condition.root]
        compare = test
        if test.opcode == "fusion":
            inner = self.called(test)[0]
            compare = inner.instructions[inner.root]
        bounds = [int(o.literal) for o in condition.operands(test) if o.opcode == "constant" and o.literal.isdigit()]
        return bounds[0] if "direction=LT" in compare.attributes and len(bounds) == 1 else None


def parse(text: str) -> Module:
    """Raises `ValueError` for text that isn't a scheduled module: its order would mean nothing."""
    first = text[: text.find("\n")]
    if not first.startswith("HloModule") or "is_scheduled=true" not in first:
        raise ValueError(f"not a compiled program's HLO: needs is_scheduled=true in its first line, has {first[:80]!r}")
    computations: dict[str, Computation] = {}
    entry = header = None
    lines: list[str] = []
    for line in text.splitlines():
        if header is None:
            header, lines = _HEADER.match(line), []
        elif line == "}":
            computation = _computation(header[2], lines)
            computations[computation.name] = computation
            entry, header = (computation if header[1] else entry), None
        elif _INSTRUCTION.match(line):
            lines.append(line)
        elif lines:
            lines[-1] += line  # an attribute may hold line breaks
    if entry is None:
        raise ValueError("not a compiled program's HLO: it has no ENTRY computation")
    counts = [int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", text[: text.find("\n\n")])]
    return Module(computations, entry, math.prod(counts))


def _computation(name: str, lines: list[str]) -> Computation:
    instructions, root = {}, ""
    for line in lines:
        is_root, instruction = _instruction(line)
        instructions[instruction.name] = instruction
        root = instruction.name if is_root else root
    return Computation(name, instructions, root or next(reversed(instructions), ""))


def _instruction(line: str) -> tuple[bool, Instruction]:
    head = _INSTRUCTION.match(line)
    if head is None:
        raise ValueError(f"{line[:80]!r}: is no instruction")
    rest = line[head.end() :]
    shape_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = _COMMENT.sub("", rest[:shape_end]), rest[shape_end:].lstrip()
    opens = rest.index("(")
    closes = _closing(rest, opens)
    opcode, inside, attributes = rest[:opens], rest[opens + 1 : closes], rest[closes + 1 :]
    operands = () if opcode in ("constant", "parameter") else tuple(_NAME.findall(_COMMENT.sub("", inside)))
    called = tuple(n for c in _CALLED.findall(attributes) for n in (_NAME.findall(c) or [c]))
    outputs = tuple(_array(*match) for match in _ARRAY.findall(shape))
    return bool(head[1]), Instruction(head[2], opcode, outputs, operands, called, attributes, inside)


def _closing(text: str, opens: int) -> int:
    """Where the parenthesis that opens at `opens` closes."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, opens):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _array(dtype: str, dims: str, layout: str) -> Array:
    shape = _ints(re.sub(r"[<=?]", "", dims))
    order, _, rest = layout.partition(":")
    padded = [shape[i] for i in reversed(_ints(order))] if order else list(shape)  # the most minor dimension last
    if tile := _TILE.search(rest):
        sizes = _ints(tile[1])
        for place, size in enumerate(reversed(sizes), start=1):
            if place <= len(padded):
                padded[-place] = -(-padded[-place] // size) * size
    space = _SPACE.search(rest)
    return Array(dtype, shape, math.prod(padded) * _bits(dtype) // 8, int(space[1]) if space else HBM)


def _bits(dtype: str) -> int:
    if dtype in BITS:
        return BITS[dtype]
    width = re.match(r"[a-z]+(\d+)", dtype)
    if width is None:
        raise ValueError(f"{dtype}: is of no known width")
    return int(width[1])


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _transposed_iota(shape: tuple[int, ...], order: tuple[int, ...]) -> list[int]:
    """0, 1, 2, … in `shape`, transposed to `order` and flattened."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return [
        sum(i * strides[axis] for i, axis in zip(index, order, strict=True))
        for index in product(*(range(shape[a]) for a in order))
    ]


def _chunks(values: list[int], size: int) -> list[list[int]]:
    return [values[i : i + size] for i in range(0, len(values), size)]
