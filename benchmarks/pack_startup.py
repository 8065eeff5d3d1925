"""How long a fresh process takes to its first denoised step and to its video: with nothing compiled, with JAX's cache of
compiled programs, and with a pack.

    python benchmarks/pack_startup.py [--model wan-tiny] [--repeats 5]

Every run is a process of its own, the three ways in turns; seconds are medians, in brackets the least and the most.
Importing jax, torch and diffusers is part of every run and counts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tpuvid.contract.options import Options
from tpuvid.plan.compilation import compile_pack

RUN = """
import json, sys, time
started = float(sys.argv[1])
import tpuvid
options = {"pack": sys.argv[3], "trust_pack": True} if len(sys.argv) > 3 else {}
first = []
pipe = tpuvid.load(sys.argv[2], **options)
video = pipe.generate("a red circle moving right", on_step=lambda done, total: first or first.append(time.time() - started))
seconds = {name: value for stage in video.history.values() for name, value in stage["seconds"].items()}
work = sum(value for name, value in seconds.items() if name.startswith("compile") or name.endswith("from pack"))
print(json.dumps({"first step": first[0], "video": time.time() - started, "compiling or loading programs": work}))
"""
MEASURES = ("compiling or loading programs", "first step", "video")


def run(model: str, cache: Path, *pack: Path) -> dict[str, float]:
    """One fresh process, timed from before it starts."""
    command = [sys.executable, "-W", "ignore", "-c", RUN, repr(time.time()), model, *map(str, pack)]
    environment = os.environ | {"TPUVID_CACHE_DIR": str(cache)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="wan-tiny")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"cold cache": [], "warm cache": [], "pack": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pack = compile_pack(arguments.model, "cpu", folder / "bench.pack", settings={}, options=Options()).path
        warm = folder / "warm"
        run(arguments.model, warm)
        for i in range(arguments.repeats):
            found["cold cache"].append(run(arguments.model, folder / f"cold{i}"))
            found["warm cache"].append(run(arguments.model, warm))
            found["pack"].append(run(arguments.model, folder / f"unused{i}", pack))
    print(f"| start | {' | '.join(f'{measure}, s' for measure in MEASURES)} |\n|---|{'---|' * len(MEASURES)}")
    for way, runs in found.items():
        cells = []
        for measure in MEASURES:
            values = [r[measure] for r in runs]
            cells.append(f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})")
        print(f"| {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
