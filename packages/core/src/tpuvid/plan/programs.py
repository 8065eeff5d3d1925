"""The job of a plan: a dry run of some stages for a topology, and what the compiler says of each program."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

from tpuvid.compute.kernels import recorded_attention
from tpuvid.compute.kernels.block_sizes import AttentionShape
from tpuvid.contract.options import Options
from tpuvid.errors import InputError
from tpuvid.plan.cost import predict
from tpuvid.plan.dryrun import PROMPT, DryProgram, DryRuntime, Ledger, Loaded, configs_checkpoint, dry_generate
from tpuvid.plan.schedules import schedule_cycles
from tpuvid.plan.topologies import LOCAL, parse_topology
from tpuvid.plugin.lookup import resolve_model


def compile_stages(job: Mapping[str, Any]) -> dict[str, Any]:
    """Compile ``job["stages"]`` of a model for ``job["topology"]``.

    `job` also has "model", "settings" (of `GenerationConfig`), "options" (`Options.recorded`) and "dump", the folder that
    libtpu was told to leave schedules in (None: no times are asked for).
    Returns what `tpuvid.plan.planner` makes a plan of, JSON-ready; raises `InputError` for what can't run there.
    """
    programs: list[tuple[DryProgram, dict[str, Any] | None]] = []

    def keep(program: DryProgram) -> None:
        programs.append((program, _predict(program, job["topology"], job["dump"])))

    runtime, usable = _dry_runtime(job, compiled_stages=tuple(job["stages"]), on_program=keep)
    loaded = _run(job, runtime)
    return {
        "usable": usable,
        "device_kind": runtime.devices[0].device_kind,
        "devices": len(runtime.devices),
        "dtype": runtime.dtype.name,
        "versions": {name: version(name) for name in ("jax", "libtpu", "diffusers") if find_spec(name)},
        "stages": {
            stage: {
                "weights": loaded[stage].weights,
                "layout": loaded[stage].layout and str(loaded[stage].layout),
                "programs": [_describe(p, found) for p, found in programs if p.stage == stage],
            }
            for stage in job["stages"]
        },
    }


def attention_calls(job: Mapping[str, Any]) -> list[AttentionShape]:
    """The shapes with which one denoising step calls the attention kernel on one device, each once; nothing is compiled.

    `job` is as for `compile_stages`, without "stages" and "dump".
    """
    runtime, _ = _dry_runtime(job, compiled_stages=())
    with recorded_attention() as calls:
        _run(job, runtime, until="denoise")
    return list(dict.fromkeys(calls))


def _dry_runtime(job: Mapping[str, Any], **fields: Any) -> tuple[DryRuntime, int | None]:
    """On the job's topology, and the bytes of memory that programs may use on each device."""
    devices, usable = _devices(job["topology"])
    return DryRuntime.create(Options(**job["options"]), **fields, devices=devices, ledger=Ledger()), usable


def _run(job: Mapping[str, Any], runtime: DryRuntime, until: str = "decode") -> dict[str, Loaded]:
    spec, checkpoint = resolve_model(job["model"])
    config = spec.configure(prompt=PROMPT, **job["settings"])
    return dry_generate(spec, configs_checkpoint(spec, checkpoint, runtime.ledger.array), config, runtime, until=until)


def _devices(topology: str) -> tuple[list[jax.Device], int | None]:
    """The devices to compile for, and the bytes of memory that programs may use on each."""
    if topology not in LOCAL:
        slice_ = parse_topology(topology)
        return slice_.jax_devices(), int(slice_.chip.usable_gib * 2**30)
    try:
        devices = jax.local_devices(backend=topology)
    except RuntimeError:
        raise InputError(f"topology={topology}: JAX sees no {topology} on this machine; name a TPU slice like v6e-8") from None
    return devices, (devices[0].memory_stats() or {}).get("bytes_limit")


def _describe(program: DryProgram, analysis: dict[str, Any] | None) -> dict[str, Any]:
    footprint = program.footprint
    return {
        "name": program.name,
        "calls": program.calls,
        "mesh": {axis: size for axis, size in program.mesh.shape.items()},
        "compile_seconds": round(program.compile_seconds, 1),
        "footprint": footprint and vars(footprint),
        "around": program.around,
        "peak": program.peak,
        "prediction": analysis,
    }


def _predict(program: DryProgram, topology: str, dump: str | None) -> dict[str, Any] | None:
    """What one run takes on a TPU, by the schedules that libtpu has left in `dump`; they are removed."""
    if program.compiled is None or dump is None:
        return None
    coords = [tuple(device.coords) for device in program.mesh.devices.flat]
    cycles = schedule_cycles(Path(dump), program.grids)
    for file in Path(dump).iterdir():
        file.unlink()
    return predict(program.compiled.as_text() or "", parse_topology(topology), coords=coords, schedule_cycles=cycles).to_dict()
