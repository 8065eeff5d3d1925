"""Full and read-only disks: a line, exit code 1 or 2, nothing lost, and the same command goes on where there is room again."""

import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torture.audit import check_folder, check_silence, left_over
from torture.children import run
from torture.kills import Scenario, results


def torture(work: Path, scenarios: Sequence[Scenario], count: int, rng: random.Random) -> Counter:
    counts: Counter = Counter()
    found = [scenario for scenario in scenarios if scenario.name in ("generate", "decode", "batch")]
    for number in range(count):
        scenario = found[number % len(found)]
        folder = work / f"full-{number}"
        size = rng.choice((8, 32, 64, 128, 256, 512)) * 1024
        if number % 2 and _mounted(folder, size):
            how = "full tmpfs"
            outcome = _on_tmpfs(scenario, folder, work)
        else:
            how = "file size limit"
            scenario.prepare(folder)
            outcome = run(scenario.arguments(folder), work, file_bytes=size)
        check_silence(outcome.err)
        assert outcome.code in (0, 1, 2, 3) and (outcome.code == 0 or outcome.err.strip()), outcome
        finished: dict[Path, str] = {}
        check_folder(folder, finished)
        if "--overwrite" in scenario.arguments(folder):
            finished.clear()
        again = run(scenario.arguments(folder), work)
        assert again.code == 0, again.err
        check_folder(folder, finished)
        assert results(folder) == scenario.expected, f"{scenario.name}: another result than undisturbed"
        assert not (rest := left_over(folder)), rest
        counts[f"{how}: {'refused or failed' if outcome.code else 'was large enough'}"] += 1
        shutil.rmtree(folder)
    counts.update(_read_only(work, found))
    return counts


def _mounted(folder: Path, size: int) -> bool:
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        folder.rmdir()
    return done.returncode == 0


def _on_tmpfs(scenario: Scenario, folder: Path, work: Path):
    """On the small disk; what is left there is then moved to a large one of the same name."""
    moved = folder.with_name(f"{folder.name}-moved")
    try:
        source = work / "prepared"
        scenario.prepare(source)
        for path in source.iterdir():
            try:
                shutil.copy(path, folder)
            except OSError:  # not even what it reads fits: then it is missing
                (folder / path.name).unlink(missing_ok=True)
        outcome = run(scenario.arguments(folder), work)
        shutil.copytree(folder, moved)
        for path in source.iterdir():
            shutil.copy(path, moved)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        shutil.rmtree(source, ignore_errors=True)
        folder.rmdir()
    moved.rename(folder)
    return outcome


def _read_only(work: Path, found: list[Scenario]) -> Counter:
    """On a file system that is mounted so; where none can be mounted, in a folder that only root could write to."""
    counts: Counter = Counter()
    for scenario in found:
        folder = work / f"read-only-{scenario.name}"
        mounted = _mounted(folder, 2**24)
        if not mounted and os.getuid() == 0:
            counts["read-only: not tried, root writes everywhere and nothing can be mounted"] += 1
            continue
        source = work / "prepared"
        scenario.prepare(source)
        shutil.copytree(source, folder, dirs_exist_ok=True)
        shutil.rmtree(source)
        before = sorted(path.name for path in folder.iterdir())
        if mounted:
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        else:
            folder.chmod(0o555)
        try:
            outcome = run(scenario.arguments(folder), work)
            assert sorted(path.name for path in folder.iterdir()) == before
        finally:
            if mounted:
                subprocess.run(["umount", str(folder)], check=True)
            else:
                folder.chmod(0o755)
        check_silence(outcome.err)
        assert outcome.code in (1, 2) and ("writ" in outcome.err or "can't be made" in outcome.err), outcome
        counts["read-only: refused"] += 1
        shutil.rmtree(folder)
    return counts
