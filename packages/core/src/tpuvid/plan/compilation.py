"""`tpuvid compile`: the programs that `generate` will need, compiled for a topology in a process of its own, into a pack."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tpuvid.compute.progress import current
from tpuvid.compute.stage_loader import open_stage
from tpuvid.contract.events import Progressed
from tpuvid.contract.options import Options
from tpuvid.contract.stages import STAGES
from tpuvid.errors import InputError, TpuvidError
from tpuvid.files.atomic import check_output, publish
from tpuvid.files.scratch import scratch_folder
from tpuvid.plan.jobs import Jobs
from tpuvid.plan.topologies import Topology, parse_topology, require_libtpu


def local_topology(text: str) -> Topology | None:
    """The TPU slice that `text` names, or None for "cpu": this machine's. Raises `InputError` for anything else."""
    if text.strip().lower() == "cpu":
        return None
    if text.strip().lower() == "gpu":
        raise InputError("topology='gpu': packs are made for TPU slices and for the CPU; a GPU compiles in seconds")
    return parse_topology(text)


@dataclass(frozen=True)
class Compiled:
    """What was made."""

    path: Path
    bytes: int
    programs: list[dict[str, Any]]
    """The stage, name, bytes in the pack and seconds to compile of each program."""


def compile_pack(
    model: str,
    topology: str,
    path: Path,
    *,
    settings: Mapping[str, Any],
    options: Options,
    overwrite: bool = False,
) -> Compiled:
    """Compile all that `generate` runs with these settings and options for `topology`, and write the pack.

    Nothing is left behind unless all is done: a killed process takes its job and what that has written with it.
    Raises `InputError` for a model, settings or a topology that can't be had, `TpuvidError` where a program doesn't compile.
    """
    slice_ = local_topology(topology)
    if slice_ is not None:
        require_libtpu()
    check_output(path, overwrite=overwrite)
    environment = {"JAX_PLATFORMS": "cpu"} if slice_ is None else slice_.environment()
    with _beside(path) as scratch, Jobs(scratch) as jobs:
        argument = {
            "model": model,
            "topology": None if slice_ is None else slice_.name,
            "settings": dict(settings),
            "options": options.recorded(),
            "file": str(scratch / "pack"),
        }
        jobs.start("compile", "tpuvid.plan.compilation:compile_job", argument, environment)
        result = _follow(jobs)
        made = scratch / "pack"
        size = made.stat().st_size
        publish(made, path, overwrite=overwrite)
    return Compiled(path, size, result["programs"])


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A scratch folder on the file system of `path`, so that the finished pack need only be renamed."""
    parent = next(p for p in path.absolute().parents if p.exists())
    try:
        with scratch_folder(parent) as scratch:
            yield scratch
    except OSError as error:
        raise TpuvidError(
            f"{path}: can't be written ({error.strerror or error}); free space or choose another place"
        ) from error


def _follow(jobs: Jobs) -> dict[str, Any]:
    """The job's result; what it reports on the way is reported as if we did it."""
    at = None
    try:
        for _, event in jobs.events():
            if "progressed" in event:
                at = Progressed(**event["progressed"])
                current().emit(at)
            elif "result" in event:
                return event["result"]
    except BaseException:
        if at and at.seconds is None:  # the job was killed within it
            current().emit(replace(at, failed=True))
        raise
    raise TpuvidError("the compile job ended without a result")


def compile_job(argument: Mapping[str, Any]) -> dict[str, Any]:
    """Runs in a process of its own; writes the pack to ``argument["file"]``."""
    progress = current()
    with progress.phase("start"):
        import jax

        from tpuvid.compute.packs.pack import PackWriter
        from tpuvid.compute.run_key import run_key
        from tpuvid.plan.dryrun import PROMPT, DryProgram, DryRuntime, Ledger, configs_checkpoint, dry_generate
        from tpuvid.plugin.lookup import resolve_model

        options, topology = Options(**argument["options"]), argument["topology"]
        devices = jax.devices() if topology is None else parse_topology(topology).jax_devices()
        spec, checkpoint = resolve_model(argument["model"])

    writer, programs = PackWriter(), []

    def keep(program: DryProgram) -> None:
        if program.compiled is None:
            assert program.needed is not None, "it is compiled, or it doesn't fit"
            raise TpuvidError(
                f"{program.name} needs {program.needed / 2**30:.1f} GiB per device, more than {topology} has; "
                "choose a larger topology, another --mesh, fewer frames or a smaller size"
            )
        packed = writer.add(program.stage, program.name, program.compiled, program.arguments, program.mesh)
        about = {"stage": packed.stage, "name": packed.name, "bytes": packed.bytes}
        programs.append(about | {"seconds": round(program.compile_seconds, 1)})

    ledger = Ledger()
    text_encoder_elsewhere = topology is not None and options.text_encoder_device == "cpu"
    runtime = DryRuntime.create(
        options,
        dtype=options.dtype or ("float32" if topology is None else "bfloat16"),
        devices=devices,
        ledger=ledger,
        on_program=keep,
        # a CPU's programs are for that CPU alone, and a TPU's host has another one than this machine
        compiled_stages=("denoise", "decode") if text_encoder_elsewhere else tuple(STAGES),
    )
    configs = configs_checkpoint(spec, checkpoint, ledger.array)
    config = spec.configure(prompt=PROMPT, **argument["settings"])
    with progress.phase("open stages", detail=True):
        stages = {name: open_stage(spec, name, configs, runtime) for name in STAGES}
        config = stages["denoise"].resolve(config)
        key = run_key(spec, stages, config, runtime)
        del stages
    dry_generate(spec, configs, config, runtime)
    with progress.phase("write"):
        writer.write(Path(argument["file"]), key)
        with open(argument["file"], "rb+") as file:
            os.fsync(file.fileno())
    return {"programs": programs}
