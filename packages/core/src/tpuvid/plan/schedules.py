"""The cycles of a program's instructions, from the schedules that libtpu dumped while it compiled the program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tpuvid.plan.bundles import Grid, dumped, read_schedule


def schedule_cycles(folder: Path, grids: Mapping[str, Sequence[Grid]] | None = None) -> dict[str, float]:
    """The cycles of each instruction, Pallas kernels and XLA's own fusions alike: what `tpuvid.plan.cost.predict` takes.

    `folder` is what `tpuvid.plan.bundles.dump_flags` named to the process, which must have compiled one program alone: the
    dumps don't say which program an instruction is of. `grids` are those of its Pallas kernels, as `pallas_grids` finds them.
    Of instructions with the same code libtpu dumps one.
    """
    return {name: read_schedule(name, bundles, table, grids).cycles for name, bundles, table in dumped(folder)}
