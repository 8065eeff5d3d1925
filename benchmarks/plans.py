"""The tables of docs/planning.md: the registered models at their default size on a v6e-8, and the most frames that fit at 720p.

    python benchmarks/plans.py [default] [frames] [--model NAME…]

Predicted: libtpu compiles every program for the slice on this machine (hours for all of it on two cores); none is run.
"""

from __future__ import annotations

import argparse

import click
from tpuvid.plan.planning import GIB, Planner
from tpuvid.registry import registry

MODELS = ("wan2.1-t2v-14b", "wan2.1-t2v-1.3b", "hunyuanvideo-1.5-t2v-720p", "hunyuanvideo-1.5-t2v-480p", "cogvideox1.5-5b")
OPTIONS = {"mesh": None, "dtype": "bfloat16", "attention_backend": "auto", "vae_tiling": False}
SLICES = ("v6e-1", "v6e-4", "v6e-8")


def default_size(model: str) -> str:
    """One row: memory by stage, the step's time by part, and one video's."""
    planner = Planner(model, registry().get(model), OPTIONS, say=lambda line: click.echo(line, err=True))
    config = planner.spec.configure()
    plan = planner.plan("v6e-8", config)
    step = plan.stages["denoise"].programs[0]["prediction"]
    total = sum(stage.seconds for stage in plan.stages.values())
    cells = [
        model,
        f"{config.width}×{config.height}×{config.num_frames}",
        " / ".join(f"{stage.peak / GIB:.1f}" for stage in plan.stages.values()),
        "yes" if plan.fits else "no",
        f"{step['flops'] / 1e12:.0f}",
        f"{step['seconds']:.2f}",
        " / ".join(f"{part['seconds']:.2f}" for part in step["parts"].values()),
        f"{step['share_of_peak']:.0%}",
        f"{plan.stages['encode'].seconds:.2f} / {plan.stages['denoise'].seconds:.0f} / {plan.stages['decode'].seconds:.1f}",
        f"{total:.0f}",
        " / ".join(f"{stage.compile_seconds:.0f}" for stage in plan.stages.values()),
    ]
    return row(cells)


def most_frames(model: str) -> str:
    """One row: on each slice, the most frames with which the denoiser fits at 1280×720, and whether they can be decoded."""
    planner = Planner(model, registry().get(model), OPTIONS, say=lambda line: click.echo(line, err=True))
    config = planner.spec.configure(height=720, width=1280)
    cells = [model]
    for topology in SLICES:
        frames = planner.largest_num_frames(topology, config, ("denoise",))
        cells.append(str(frames or "none"))
    return row(cells)


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
            "attention / matmul / elementwise / collectives / other", "of the peak", "s: encode / denoise / decode",
            "s per video", "compile s",
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
