"""The cycles of a program's instructions, from the schedules that libtpu dumped while it compiled the program."""

from __future__ import annotations

from pathlib import Path

from tpuvid.plan.bundles import dumped, schedule


def schedule_cycles(folder: Path) -> dict[str, float]:
    """By instruction, of Pallas kernels and XLA's own fusions alike: what `tpuvid.plan.cost.predict` takes.

    `folder` is what `tpuvid.plan.bundles.dump_flags` named to the process, which must have compiled one program alone:
    the dumps don't say which program an instruction is of. Of instructions with the same code libtpu dumps one.
    """
    return {
        name: schedule(name, bundles.read_text(errors="replace"), table.read_text()).cycles
        for name, bundles, table in dumped(folder)
    }
