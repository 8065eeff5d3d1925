"""The cycles of a program's instructions, from the schedules that libtpu dumped while it compiled the program."""

from __future__ import annotations

import re
from pathlib import Path

from tpuvid.plan.bundles import BUNDLES, UTILISATION, schedule


def schedule_cycles(folder: Path) -> dict[str, float]:
    """By instruction, of Pallas kernels and XLA's own fusions alike: what `tpuvid.plan.cost.predict` takes.

    `folder` is what `tpuvid.plan.bundles.dump_flags` named to the process, which must have compiled one program alone:
    the dumps don't say which program an instruction is of. Of instructions with the same code libtpu dumps one.
    """
    cycles = {}
    for path in sorted(folder.glob(f"*-{BUNDLES}.txt")):
        label = re.fullmatch(rf"(\d+)-(.+)-\d+-{BUNDLES}\.txt", path.name)
        tables = list(folder.glob(f"{label[1]}-*-{UTILISATION}.txt")) if label else []
        if len(tables) == 1:
            cycles[label[2]] = schedule(label[2], path.read_text(errors="replace"), tables[0].read_text()).cycles
    return cycles
