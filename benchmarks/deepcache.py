"""What DeepCache saves and costs: denoising time, and PSNR and SSIM against the uncached videos of the same seeds.

    python benchmarks/deepcache.py [--model wan-tiny] [--repeats 3]

Everything runs in one process, warmed up, schedule by schedule in turns; times are medians over prompts and repeats.
"""

import argparse
import itertools
import statistics
import tempfile
from pathlib import Path

import numpy as np
import tpuvid
from tpuvid.contract import Latents
from tpuvid.files.stage_files import save_frames
from tpuvid.runs.compare import Comparison, compare
from tpuvid.runs.pipeline import Pipeline
from tpuvid.runs.video import Video

PROMPTS = (
    "a red circle moving right on a black background",
    "a blue square growing on a white background",
    "a yellow triangle moving up on a black background",
    "a green cross shrinking on a white background",
)
SCHEDULES = ((11, 45, 4), (6, 22, 2), (4, 22, 2), (4, 22, 3), (2, 24, 3), (2, 24, 6))
"""(start, end, interval); the first is the published one, made for 50 steps."""


def sample(pipe: Pipeline, prompt: str, schedule: tuple[int, int, int] | None) -> tuple[Latents, Video]:
    cache = (
        {}
        if schedule is None
        else dict(zip(("cache_start_step", "cache_end_step", "cache_step_interval"), schedule, strict=True))
    )
    latents = pipe.denoise(pipe.encode(prompt), cache=None if schedule is None else "deepcache", **cache)
    return latents, pipe.decode(latents)


def distance(a: Video, b: Video) -> Comparison:
    with tempfile.TemporaryDirectory() as folder:
        return compare(*(save_frames(Path(folder) / name, v.frames, {}, overwrite=False) for name, v in (("a", a), ("b", b))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="wan-tiny")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    pipe = tpuvid.load(arguments.model, warmup_steps=1)
    schedules = (None, *SCHEDULES)
    seconds: dict = {schedule: [] for schedule in schedules}
    latents: dict = {}
    videos: dict = {}
    for _, prompt, schedule in itertools.product(range(arguments.repeats), PROMPTS, schedules):
        latents[schedule], videos[schedule, prompt] = sample(pipe, prompt, schedule)
        seconds[schedule].append(latents[schedule].history["denoise"]["seconds"]["denoise"])
    plain = statistics.median(seconds[None])
    print(
        "| start, end, interval | full steps | cached | denoise s | time | PSNR dB | worst | SSIM |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for schedule in schedules:
        took = statistics.median(seconds[schedule])
        steps = pipe.spec.defaults.num_inference_steps
        if schedule is None:
            print(f"| no cache | {steps} | 0 | {took:.3f} | 1.00× | | | |")
            continue
        saved = latents[schedule].history["denoise"]["cache"]["saved_steps"]
        found = [distance(videos[None, prompt], videos[schedule, prompt]) for prompt in PROMPTS]
        psnr = [f.psnr for f in found]
        print(
            f"| {', '.join(map(str, schedule))} | {steps - saved} | {saved} | {took:.3f} | {plain / took:.2f}× "
            f"| {np.mean(psnr):.1f} | {min(psnr):.1f} | {np.mean([f.ssim for f in found]):.4f} |"
        )


if __name__ == "__main__":
    main()
