"""One denoising step with guidance on this machine's GPU: tpuvid against diffusers (torch SDPA, torch.compile), random weights.

    python benchmarks/gpu_step.py [--models wan2.1-t2v-1.3b wan2.1-t2v-14b] [--steps 6]

Each of the two runs in a process of its own, with the model's default size and bfloat16; times are the median of all steps but
the first. Without a GPU that both can use it says so and measures nothing. ``--platform cpu`` is for trying it with wan-tiny.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

ENGINES = ("tpuvid", "diffusers")
GIB = 2**30


class NoDevice(Exception):
    pass


def run_tpuvid(model: str, platform: str, steps: int) -> dict[str, Any]:
    import jax
    import numpy as np
    from tpuvid.compute.runtime import Runtime
    from tpuvid.compute.stage_loader import open_stage
    from tpuvid.contract.loop import Loop
    from tpuvid.plan.dryrun import configs_checkpoint
    from tpuvid.plugin.lookup import resolve_model

    try:
        devices = jax.local_devices(backend=platform)[:1]
    except RuntimeError:
        raise NoDevice(f"JAX sees no {platform}") from None
    keys = map(jax.random.key, itertools.count())

    def place(like: Any, sharding: Any) -> jax.Array:
        return jax.jit(lambda key: jax.random.normal(key, like.shape, like.dtype) * 0.02, out_shardings=sharding)(next(keys))

    spec, checkpoint = resolve_model(model)
    runtime = Runtime.create(dtype="bfloat16" if platform == "gpu" else "float32", devices=devices)
    denoiser = open_stage(spec, "denoise", configs_checkpoint(spec, checkpoint, place), runtime)
    denoiser.load()
    config = denoiser.resolve(spec.configure(num_inference_steps=steps))
    shape = 1, config.max_sequence_length, denoiser.traced.module.config.text_dim
    text = {name: np.ones(shape, np.float32) for name in ("prompt_embeds", "negative_prompt_embeds")}
    ends: list[float] = []
    denoiser.denoise(text, config, Loop(seeds=(config.seed,), after_step=lambda at: ends.append(time.perf_counter())))
    stats = devices[0].memory_stats() or {}
    return {"ends": ends, "bytes": stats.get("peak_bytes_in_use"), "device": devices[0].device_kind}


def run_diffusers(model: str, platform: str, steps: int) -> dict[str, Any]:
    import diffusers
    import torch
    from tpuvid.plan.dryrun import configs_checkpoint
    from tpuvid.plugin.lookup import resolve_model

    gpu = platform == "gpu"
    if gpu and not torch.cuda.is_available():
        raise NoDevice("this torch sees no GPU")
    spec, checkpoint = resolve_model(model)
    configs = configs_checkpoint(spec, checkpoint, lambda *_: None)
    with torch.device("cuda" if gpu else "cpu"):
        transformer = diffusers.WanTransformer3DModel.from_config(configs.config("transformer"))
    transformer.to(torch.bfloat16 if gpu else torch.float32)
    if gpu:
        transformer.compile()
    scheduler = configs.config("scheduler", "scheduler_config.json")
    scheduler = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
    pipe = diffusers.WanPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    config = spec.configure(num_inference_steps=steps)
    text = torch.ones(
        1, config.max_sequence_length, transformer.config.text_dim, dtype=transformer.dtype, device=transformer.device
    )
    ends: list[float] = []

    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        if gpu:
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        return tensors

    pipe(
        prompt_embeds=text, negative_prompt_embeds=text, output_type="latent", num_inference_steps=steps, height=config.height,
        width=config.width, num_frames=config.num_frames, guidance_scale=config.guidance_scale,
        callback_on_step_end=on_step_end,
    )  # fmt: skip
    return {"ends": ends, "bytes": torch.cuda.max_memory_allocated() if gpu else None}


def measure(engine: str, model: str, args: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--engine", engine, "--models", model]
    command += ["--steps", str(args.steps), "--platform", args.platform]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["wan2.1-t2v-1.3b", "wan2.1-t2v-14b"])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--platform", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps: needs at least 2, the first isn't counted")
    if args.engine:
        run = {"tpuvid": run_tpuvid, "diffusers": run_diffusers}[args.engine]
        try:
            print(json.dumps(run(args.models[0], args.platform, args.steps)))
        except NoDevice as error:
            print(json.dumps({"missing": str(error)}))
        return

    rows = []
    for model in args.models:
        results = [measure(engine, model, args) for engine in ENGINES]
        if missing := [result["missing"] for result in results if "missing" in result]:
            print(f"nothing was measured: {' and '.join(missing)}")
            return
        ours, theirs = (statistics.median(b - a for a, b in itertools.pairwise(result["ends"])) for result in results)
        memory = ["-" if result["bytes"] is None else f"{result['bytes'] / GIB:.1f}" for result in results]
        rows.append(f"| `{model}` | {ours:.3f} | {theirs:.3f} | {theirs / ours:.2f}× | {' / '.join(memory)} |")
    print(f"On {results[0]['device']}, {args.steps - 1} steps each:\n")
    print("| model | tpuvid, s per step | diffusers, s per step | diffusers / tpuvid | peak GiB, tpuvid / diffusers |")
    print("|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
