"""The denoising programs that `generate` would run on TPU v6e chips, compiled by libtpu here; nothing is computed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpuvid.files.scratch import scratch_folder
from tpuvid.plan.jobs import Jobs
from tpuvid.plan.topologies import parse_topology

GATHER = re.compile(r"= \w+\[([\d,]+)\]\S* all-gather\(")
"""The shape of what an all-gather gives."""
ATTENTION = re.compile(r"%optimistic_flash_attention\S* = ")
"""A call of the Pallas kernel."""


def compile_steps(model: str, topology: str = "v6e-8", **settings) -> dict:
    """What the compiler says of the full step and, with a cache, of the cached one. `settings` differ from the defaults."""
    with scratch_folder() as scratch, Jobs(scratch) as jobs:
        job = {"model": model, "topology": topology, "settings": settings}
        environment = parse_topology(topology).environment() | {"PYTHONPATH": str(Path(__file__).parents[1])}
        jobs.start("steps", "shared.aot:_compile", job, environment)
        events = [event for _, event in jobs.events()]
    return events[-1]["result"]


def _compile(job: Mapping[str, Any]) -> dict:
    from tpuvid.plan.dryrun import DryProgram, DryRuntime, Ledger, configs_checkpoint, dry_generate
    from tpuvid.plugin.lookup import resolve_model

    programs: dict[str, dict] = {}

    def look(program: DryProgram) -> None:
        hlo = program.compiled.as_text()
        programs[program.name.split(" ")[0]] = {
            "mesh": dict(program.mesh.shape),
            "gib": program.footprint.total / 2**30,
            "attentions": len(ATTENTION.findall(hlo)),
            "largest gather": max((math.prod(map(int, shape.split(","))) for shape in GATHER.findall(hlo)), default=0),
            "loops": hlo.count(" while("),
            "seconds": program.compile_seconds,
        }

    ledger = Ledger()
    runtime = DryRuntime.create(
        dtype="bfloat16",
        devices=parse_topology(job["topology"]).jax_devices(),
        compiled_stages=("denoise",),
        ledger=ledger,
        on_program=look,
    )
    spec, checkpoint = resolve_model(job["model"])
    config = spec.configure(prompt="a prompt", **job["settings"])
    dry_generate(spec, configs_checkpoint(spec, checkpoint, ledger.array), config, runtime)
    full = programs.get("full") or programs["denoiser"]
    return {"mesh": full["mesh"], "full": full, "cached": programs.get("cached")}
