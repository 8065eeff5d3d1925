import argparse
import gc
import os
import random
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TPUVID_CACHE_DIR", str(Path(__file__).parents[2] / ".pytest_cache" / "tpuvid"))

from torture import arguments, children, damages, disks, kills  # noqa: E402  (after the environment)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m torture", description=__import__("torture").__doc__)
    for name, count in (("kills", 100), ("damages", 1000), ("disks", 24), ("arguments", 2000)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    gc.set_threshold(100_000)  # imports make a million objects, none of which is garbage
    children.warm()
    rng = random.Random(given.seed)
    undisturbed = tempfile.TemporaryDirectory()
    scenarios = cache(lambda: kills.scenarios(Path(undisturbed.name)))
    parts = {
        "kills": lambda work: kills.torture(work, scenarios(), given.kills, rng),
        "disks": lambda work: disks.torture(work, scenarios(), given.disks, rng),
        "damages": lambda work: damages.torture(work, given.damages, rng),
        "arguments": lambda work: arguments.torture(work, given.arguments, given.seed),
    }
    for name, part in parts.items():
        if not getattr(given, name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o755)
            begin = time.monotonic()
            counts = part(Path(folder))
        print(f"{name}: {time.monotonic() - begin:.0f} s")
        for what, count in sorted(counts.items()):
            print(f"  {what}: {count}")
        sys.stdout.flush()


main()
