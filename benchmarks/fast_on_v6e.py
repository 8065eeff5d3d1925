"""Attention and whole denoising steps on a v6e-8: ours, with JAX's splash attention, and in the earlier layout.

    python benchmarks/fast_on_v6e.py [attention] [steps] [--model NAME…]

Beside our kernel as it is: with Q·K in int8, and with a window of 8 frames to either side.

Predicted: libtpu compiles every kernel and every step in this run (1 to 4 minutes each on two cores); none is run on a TPU.
Only the errors are measured: of the kernels in interpret mode on the CPU, at 600 queries and 3,000 keys, before the output is
rounded where the kernel can give it so.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
from tpuvid.contract.options import Options
from tpuvid.files.scratch import scratch_folder
from tpuvid.plan.bundles import dump_flags, kernels, pallas_grids
from tpuvid.plan.jobs import Jobs
from tpuvid.plan.planner import GIB, Planner
from tpuvid.plan.topologies import parse_topology
from tpuvid.plugin.registry import registry

TOPOLOGY = parse_topology("v6e-8")


class Call(NamedTuple):
    what: str
    heads: int
    frames: int
    """The frames of tokens."""
    tokens_per_frame: int
    video_frames: int
    """The video's frames in a frame of tokens."""
    text: int
    dim: int
    bound_ms: float
    """The cycles of the matrix units, transposed: 96 per 256×256 scores for D = 128; for D = 64 as the earlier study has it."""


CALLS = (
    Call("Wan 2.1 14B 720p×81", 5, 21, 3600, 4, 0, 128, 23.9),
    Call("HunyuanVideo 1.5 720p×121", 2, 31, 3600, 4, 256, 128, 21.0),
    Call("CogVideoX1.5 1360×768×81", 6, 11, 4080, 8, 226, 64, 8.5),
)
WINDOW = 8
"""Frames of the video to either side."""
STOCK_BLOCKS = (3328, 2816, 256)
"""With which the published measurement was made."""
PUBLISHED = "splash, published tiles, padding not masked"
MODELS = ("wan2.1-t2v-14b", "hunyuanvideo-1.5-t2v-720p", "cogvideox1.5-5b")
LAYOUTS = (("dp=2,sp=4", "flash"), ("dp=2,sp=4", "splash"), ("dp=2,tp=4", "flash"), ("dp=2,tp=4", "splash"))


def attention(kernel: str, band: Any = None) -> Any:
    from tpuvid.compute.kernels.block_sizes import Blocks
    from tpuvid.compute.kernels.flash import attention_flash
    from tpuvid.compute.kernels.splash import attention_splash

    return {
        "flash": attention_flash,
        "flash, int8": partial(attention_flash, int8=True, smooth_k=True),
        "flash, window": partial(attention_flash, band=band),
        "splash": attention_splash,
        PUBLISHED: partial(attention_splash, blocks=Blocks(*STOCK_BLOCKS)),
    }[kernel]


def count(job: Mapping[str, Any]) -> float:
    """A job: predicted milliseconds of one call."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding
    from tpuvid.compute.kernels.window import Band, Window

    call = Call(*job["call"])
    video = call.frames * call.tokens_per_frame
    band = Band(Window.of_frames(WINDOW // call.video_frames, tokens_per_frame=call.tokens_per_frame, total=video), video)
    chip = SingleDeviceSharding(TOPOLOGY.jax_devices()[0])
    lengths = video + ("window" not in job["kernel"]) * call.text, video + call.text
    if job["kernel"] == PUBLISHED:  # it takes padding for keys, so that nothing need be masked
        lengths = (-(-length // block) * block for length, block in zip(lengths, STOCK_BLOCKS, strict=False))
    q, kv = (jax.ShapeDtypeStruct((1, call.heads, length, call.dim), jnp.bfloat16, sharding=chip) for length in lengths)
    traced = jax.jit(attention(job["kernel"], band)).trace(q, kv, kv)
    traced.lower().compile()
    (kernel,) = kernels(Path(job["dump"]), pallas_grids(traced.jaxpr)).values()
    return kernel.milliseconds(TOPOLOGY.chip)


def measure_error(job: Mapping[str, Any]) -> float:
    """A job: relative error of bfloat16 attention against float64."""
    import jax.numpy as jnp
    import numpy as np
    from tpuvid.compute.kernels.window import Band, Window

    rng, dim, band = np.random.default_rng(0), Call(*job["call"]).dim, Band(Window(300, 2), 3000, parts=5, part=2)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 1, n, dim)), jnp.bfloat16) for n in (600, 3000, 3000))
    q = q * 2
    own = {} if "splash" in job["kernel"] else {"out_dtype": jnp.float32}
    found = np.asarray(attention(job["kernel"], band)(q, k, v, interpret=True, **own), np.float64)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = q @ k.swapaxes(2, 3) * dim**-0.5
    if "window" in job["kernel"]:
        scores = np.where(band.mask(600, 3000), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    exact = p @ v / p.sum(-1, keepdims=True)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def run(function: str, job: dict[str, Any], environment: Mapping[str, str] | None = None) -> Any:
    """In a process of its own."""
    with scratch_folder() as scratch, Jobs(scratch) as jobs:
        dump = scratch / "dump"
        dump.mkdir()
        environment = TOPOLOGY.environment(dump_flags(dump)) if environment is None else environment
        environment = {**environment, "PYTHONPATH": str(Path(__file__).parent)}
        jobs.start(function, f"fast_on_v6e:{function}", job | {"dump": str(dump)}, environment)
        result = [event for _, event in jobs.events()][-1]["result"]
        shutil.rmtree(dump)
    return result


def attention_table() -> None:
    print("| one call | kernel | predicted ms | of the bound | relative error |\n|---|---|---|---|---|", flush=True)
    for call in CALLS:
        for kernel in ("flash", "splash", PUBLISHED, "flash, int8", "flash, window"):
            job = {"call": list(call), "kernel": kernel}
            ms, error = run("count", job), run("measure_error", job, {"JAX_PLATFORMS": "cpu"})
            share = "" if kernel in ("flash, int8", "flash, window") else f"{call.bound_ms / ms:.0%}"
            print(f"| {call.what} | {kernel} | {ms:.2f} | {share} | {error:.1e} |", flush=True)


def steps_table(models: list[str]) -> None:
    print(
        "| model | layout | attention | s per step | attention / matmul / elementwise / collectives / other | GB sent | GiB |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    for model in models:
        for mesh, backend in LAYOUTS:
            options = Options(mesh=mesh, dtype="bfloat16", attention_backend=backend)
            planner = Planner(model, registry().get(model), options, say=lambda line: click.echo(line, err=True))
            stage = planner.plan_stages(TOPOLOGY.name, planner.spec.configure(), ("denoise",))["denoise"]
            step = stage.busiest["prediction"]
            parts = " / ".join(f"{part['seconds']:.2f}" for part in step["parts"].values())
            sent = sum(c["count"] * c["sent_bytes"] for c in step["collectives"]) / 1e9
            cells = [model, stage.layout, backend, f"{step['seconds']:.2f}", parts, f"{sent:.1f}", f"{stage.peak / GIB:.1f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", default=["attention", "steps"])
    parser.add_argument("--model", nargs="+", default=MODELS)
    arguments = parser.parse_args()
    if "attention" in arguments.tables:
        attention_table()
    if "steps" in arguments.tables:
        steps_table(arguments.model)


if __name__ == "__main__":
    main()
