"""Twenty prompts in one batch against twenty runs of their own: seconds per video of each stage, and in all.

    .venv/bin/python benchmarks/batch.py [--prompts 20] [--batch-sizes 1 4]

Each run is a process. Programs are compiled already (a first batch fills the cache), so that both ways only load them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from sys import executable

COLOURS, SHAPES, MOTIONS = ("red", "green", "blue", "white", "yellow"), ("circle", "square"), ("growing", "moving right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    given = parser.parse_args()
    prompts = [f"a {c} {s} {m} on a black background" for c in COLOURS for s in SHAPES for m in MOTIONS][: given.prompts]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "prompts.txt").write_text("\n".join(prompts))
        for size in given.batch_sizes:
            run(work / f"first-{size}", "--prompts", str(work / "prompts.txt"), "--batch-size", str(size))
        print("| way | wall s | s per video | loading and start | compiling or loading programs | encode | denoise | decode |")
        print("|---|---|---|---|---|---|---|---|")
        for size in given.batch_sizes:
            took = run(work / f"batch-{size}", "--prompts", str(work / "prompts.txt"), "--batch-size", str(size))
            report(f"one batch, --batch-size {size}", took, work / f"batch-{size}", len(prompts))
        took = sum(run(work / "apart", "--prompt", prompt) for prompt in prompts)
        report(f"{len(prompts)} runs", took, work / "apart", len(prompts))


def run(folder: Path, *arguments: str) -> float:
    """Seconds of ``tpuvid generate``."""
    command = [
        str(Path(executable).with_name("tpuvid")),
        "generate",
        "--model",
        "wan-tiny",
        "--output-dir",
        str(folder),
        *arguments,
    ]
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    return time.perf_counter() - begin


def report(way: str, took: float, folder: Path, count: int) -> None:
    seconds: Counter = Counter()
    for path in folder.glob("*.json"):
        if path.name != "batch.json":
            record = json.loads(path.read_text())
            for stage in record["history"].values():
                for phase, value in stage["seconds"].items():  # of a batch, what it shares stands with each of its videos
                    seconds[kind(phase)] += value / (stage.get("batch_size", 1))
    cells = [f"{seconds[name] / count:.2f}" for name in ("load", "compile", "encode", "denoise", "decode")]
    print(f"| {way} | {took:.1f} | {took / count:.2f} | {' | '.join(cells)} |", flush=True)


def kind(phase: str) -> str:
    if phase.startswith(("open", "load", "start")):
        return "load"
    return "compile" if phase.startswith("compile") else phase


if __name__ == "__main__":
    main()
