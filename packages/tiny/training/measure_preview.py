"""How near the preview decoder comes to the VAE's, and how long both take, on latents that wan-tiny itself makes.

Run it as it is: ``python measure_preview.py``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import numpy as np
import tpuvid
from sampling import sample_of_held_out
from tpuvid.contract import Latents
from tpuvid.runs.pipeline import Pipeline


def seconds(pipe: Pipeline, latents: Latents, repeats: int) -> float:
    """The median, of a pipeline that has decoded such latents before."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        pipe.decode(latents)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=12, help="a multiple of four, of prompts that training has not seen")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()

    own, preview = tpuvid.load("wan-tiny"), tpuvid.load("wan-tiny", decoder="preview")
    made, found = [], []
    for seed, scene in enumerate(sample_of_held_out(args.clips)):
        made.append(own.denoise(own.encode(scene.caption()), seed=seed))
        expected, drawn = own.decode(made[-1]).frames, preview.decode(made[-1]).frames
        found.append(-10 * np.log10(np.square(expected - drawn).mean()))
        print(f"{found[-1]:.2f} dB  seed {seed}  {scene.caption()}", flush=True)
    print(f"PSNR: mean {np.mean(found):.2f} dB, worst {min(found):.2f} dB, {len(found)} clips")
    vae_ms, preview_ms = (1000 * seconds(pipe, made[0], args.repeats) for pipe in (own, preview))
    print(f"decoding one clip, once compiled: {vae_ms:.1f} ms by the VAE, {preview_ms:.1f} ms by the preview")
    print(f"({os.cpu_count()} cores, load {os.getloadavg()[0]:.1f})")


if __name__ == "__main__":
    main()
