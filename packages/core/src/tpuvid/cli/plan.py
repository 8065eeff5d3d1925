"""The commands that answer for a TPU without one: plan, compile, tune. Arguments are checked before heavy imports."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from tpuvid.cli.commands import Command
from tpuvid.cli.options import (
    config_option,
    load_options,
    load_options_of,
    model_option,
    overwrite_option,
    path_type,
    runtime_options,
    search_options,
    setting_options,
    shape_options,
    size_options,
    split,
    topology_option,
)
from tpuvid.contract.wording import table
from tpuvid.errors import InputError


@click.command("compile", cls=Command)
@config_option
@model_option
@topology_option
@click.option("--output", "-o", type=path_type, required=True, help="The pack.")
@setting_options(lambda each: each.programs or each.name.startswith("cache_"))  # with which alone a cache is a valid one
@load_options("mesh", "vae_tiling")
@overwrite_option
@load_options_of("encode")
@runtime_options
def compile_command(model: str, topology: str, output: Path, overwrite: bool, **given: Any) -> None:
    """Compile all that generate runs into a pack, for a machine that need not be at hand: no weights, no TPU.

    Programs depend on the model, the size, guidance on or off, the cache and the devices; not on the prompt, the seed, the
    number of steps (from two on) or the scales.
    """
    from tpuvid.plan.compilation import compile_pack
    from tpuvid.plugin.lookup import resolve_model

    settings, options = split(given)
    spec, _ = resolve_model(model)
    spec.configure(**settings)
    made = compile_pack(model, topology, output, settings=settings, options=options, overwrite=overwrite)
    for program in made.programs:
        click.echo(f"{program['stage']}: {program['name']}: {program['bytes'] / 1e6:.1f} MB, {program['seconds']:.1f} s")
    click.echo(f"pack: {made.path} ({made.bytes / 1e6:.1f} MB)")


@click.command("plan", cls=Command)
@config_option
@model_option
@topology_option
@setting_options(lambda each: each.programs or each.calls)
@load_options("mesh", "vae_tiling")
@runtime_options
@click.option("--max-frames", is_flag=True, help="Also find the largest number of frames that fits.")
@click.option("--no-search", is_flag=True, help="Where it doesn't fit, don't look for what does.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def plan_command(model: str, topology: str, max_frames: bool, no_search: bool, as_json: bool, **given: Any) -> None:
    """What a TPU would do: whether it fits, how it is laid out, how long it takes. Needs neither TPU nor weights.

    libtpu compiles the programs that `generate` would run, on this machine; they are not run.
    """
    from tpuvid.plan.planner import Planner
    from tpuvid.plan.report import render
    from tpuvid.plan.topologies import LOCAL, check_topology
    from tpuvid.plugin.lookup import resolve_model

    check_topology(topology)
    if max_frames and topology in LOCAL:
        raise InputError(f"--max-frames: {topology} doesn't say how much memory there is; name a TPU slice as --topology")
    spec, _ = resolve_model(model)
    settings, options = split(given)
    config = spec.configure(**settings)
    options = replace(options, dtype=options.dtype or ("float32" if topology == "cpu" else "bfloat16"))
    planner = Planner(model, spec, options, say=lambda line: click.echo(line, err=True))
    plan = planner.plan(topology, config)
    if not as_json:  # before what else is asked for, which takes minutes more
        click.echo(render(plan))
    searches: dict[str, Any] = {}
    if plan.fits is False and not no_search and topology not in LOCAL:
        searches["remedies"] = list(planner.remedies(plan))
    if max_frames:
        searches["max_frames"] = planner.largest_num_frames(topology, config)
    if as_json:
        click.echo(json.dumps(plan.to_dict() | searches, indent=2))
        return
    for remedy in searches.get("remedies", ()):
        click.echo(f"what fits: {remedy}")
    if max_frames:
        click.echo(f"most frames with which denoiser and VAE fit: {searches['max_frames'] or 'none'}")


@click.group()
def tune() -> None:
    """Find tile sizes of kernels for a TPU, on a machine without one."""


@tune.command("attention", cls=Command)
@click.option("--model", help="The shapes of this model's denoising step. Or give one shape by the next four.")
@size_options
@load_options("mesh")
@shape_options
@click.option("--topology", "topology_name", required=True, help="TPU slice, like v6e-8.")
@search_options
@click.option("--output", type=path_type, help="Table to write to. Default: the package's own.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def tune_attention_command(
    model: str | None, height: int | None, width: int | None, num_frames: int | None, mesh: str | None, topology_name: str,
    jobs: int | None, max_candidates: int, output: Path | None, as_json: bool, **sizes: int | None,
) -> None:  # fmt: skip
    """Blocks of the attention kernel with the fewest predicted cycles, written to the table that the kernel reads."""
    from tpuvid.plan.topologies import parse_topology
    from tpuvid.plan.tune import attention_shapes, check_tunable, tune_attention

    topology = parse_topology(topology_name, also=())
    missing = [name for name, size in sizes.items() if size is None]
    if model is not None and len(missing) < len(sizes):
        raise InputError(f"--model={model} brings its shapes; leave out --heads, --queries, --keys and --head-dim")
    video = {"height": height, "width": width, "num_frames": num_frames}
    about_model = {name: value for name, value in {**video, "mesh": mesh}.items() if value is not None}
    if model is None and about_model:
        raise InputError(f"{', '.join(_flag(name) for name in about_model)}: are about a --model, which isn't given")
    if model is None and missing:
        raise InputError(f"give --model, or a whole shape: {', '.join(map(_flag, missing))} missing")
    check_tunable(topology)
    if model is not None:
        from tpuvid.plugin.lookup import resolve_model

        resolve_model(model)[0].configure(**video)  # before a job is started
        shapes = attention_shapes(model, topology, {n: v for n, v in video.items() if v is not None}, mesh)
        which = shlex.join(["--model", model, *(part for n, v in about_model.items() for part in (_flag(n), str(v)))])
    else:
        from tpuvid.compute.kernels.block_sizes import AttentionShape

        shapes = [AttentionShape(**{name: size for name, size in sizes.items() if size is not None})]
        which = " ".join(f"{_flag(name)} {size}" for name, size in sizes.items())
    command = f"tpuvid tune attention {which} --topology {topology.name} --max-candidates {max_candidates}"
    say = partial(click.echo, err=True)
    rows = tune_attention(shapes, topology, command=command, output=output, jobs=jobs, max_candidates=max_candidates, say=say)
    if as_json:
        click.echo(json.dumps([row._asdict() for row in rows], indent=2))
    else:
        columns = ("heads", "queries", "keys", "head_dim", "block_q", "block_kv", "block_kv_compute", "predicted_ms")
        click.echo("\n".join(table(columns, ([str(getattr(row, name)) for name in columns] for row in rows))))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
