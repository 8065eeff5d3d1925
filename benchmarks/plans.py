"""The tables of docs/planning.md: the registered models at their default size on a v6e-8, and the most frames at 720p
with which the denoiser fits.

    python benchmarks/plans.py [default] [frames] [--model NAME…]

Predicted: libtpu compiles every program for the slice on this machine (hours for all of it on two cores); none is run.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import click
from tpuvid.contract.options import Options
from tpuvid.plan.planner import GIB, Planner
from tpuvid.plugin.registry import registry

MODELS = ("wan2.1-t2v-14b", "wan2.1-t2v-1.3b", "hunyuanvideo-1.5-t2v-720p", "hunyuanvideo-1.5-t2v-480p", "cogvideox1.5-5b")
OPTIONS = Options(dtype="bfloat16")
SLICES = ("v6e-1", "v6e-4", "v6e-8")


def default_size(model: str) -> str:
    """One row: memory by stage, the step's time by part, and one video's; in tiles where the VAE doesn't fit whole."""
    plan = planner(model, OPTIONS).plan("v6e-8", registry().get(model).configure())
    tiled = not plan.stages["decode"].fits
    if tiled:
        plan = planner(model, replace(OPTIONS, vae_tiling=True)).plan("v6e-8", plan.config)
    config, step = plan.config, plan.stages["denoise"].busiest["prediction"]
    cells = [
        model,
        f"{config.width}×{config.height}×{config.num_frames}",
        " / ".join(f"{stage.peak / GIB:.1f}" for stage in plan.stages.values()),
        ("yes" if plan.fits else "no") + (", `--vae-tiling`" if tiled else ""),
        f"{step['flops'] / 1e12:.0f}",
        f"{step['seconds']:.2f}",
        " / ".join(f"{part['seconds']:.2f}" for part in step["parts"].values()),
        f"{step['share_of_peak']:.0%}",
        " / ".join("-" if stage.seconds is None else f"{stage.seconds:.2f}" for stage in plan.stages.values()),
    ]
    return row(cells)


def most_frames(model: str) -> str:
    """One row: on each slice, the most frames with which the denoiser fits at 1280×720."""
    config = registry().get(model).configure(height=720, width=1280)
    found = [planner(model, OPTIONS).largest_num_frames(topology, config, ("denoise",)) for topology in SLICES]
    return row([model, *(str(frames or "none") for frames in found)])


def planner(model: str, options: Options) -> Planner:
    return Planner(model, registry().get(model), options, say=lambda line: click.echo(line, err=True))


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", choices=["default", "frames"], default=["default", "frames"])
    parser.add_argument("--model", nargs="+", default=MODELS)
    arguments = parser.parse_args()
    if "default" in arguments.tables:
        head = (
            "model", "size", "peak GiB: encode / denoise / decode", "fits", "TFLOP per device and step", "s per step",
            "attention / matmul / elementwise / collectives / other", "of the peak",
            "s per video: encode / denoise / decode",
        )  # fmt: skip
        print(row(list(head)), row(["---"] * len(head)), sep="\n")
        for model in arguments.model:
            print(default_size(model), flush=True)
    if "frames" in arguments.tables:
        print(row(["model", *SLICES]), row(["---"] * (1 + len(SLICES))), sep="\n")
        for model in arguments.model:
            print(most_frames(model), flush=True)


if __name__ == "__main__":
    main()
