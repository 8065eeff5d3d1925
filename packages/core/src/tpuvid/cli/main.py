"""The ``tpuvid`` command: argv → settings → the Python API → a line that says where the result stands.

Nothing heavy is imported before the arguments have been checked.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import tpuvid
from tpuvid.cli.commands import Commands
from tpuvid.cli.console import VERBOSE, Console
from tpuvid.cli.leave import leave
from tpuvid.cli.options import (
    config_option,
    denoising_options,
    load_options,
    load_options_of,
    many_options,
    metadata_options,
    model_option,
    overwrite_option,
    pack_options,
    path_type,
    private_option,
    prompt_again_options,
    prompt_option,
    prompts_type,
    required_prompt_option,
    runtime_options,
    save_frames_option,
    settings_of,
    split,
    stage_model_option,
)
from tpuvid.cli.signals import exit_code
from tpuvid.compute.progress import Progress, current
from tpuvid.contract.wording import table
from tpuvid.errors import DEBUG_VARIABLE, InputError, TpuvidError, unexpected
from tpuvid.plugin.checks import OWN
from tpuvid.plugin.registry import registry
from tpuvid.runs.control import Terminated

if TYPE_CHECKING:
    from tpuvid.contract.models import ModelSpec
    from tpuvid.contract.options import Options
    from tpuvid.contract.values import Latents
    from tpuvid.files.checkpoint import Checkpoint
    from tpuvid.runs.pipeline import Pipeline

STAGE_FOLDER = "stage_outputs"


def main(argv: list[str] | None = None) -> None:
    """Run the command and end the process; every failure is one line on stderr and an exit code."""
    gc.set_threshold(100_000)  # imports make a million objects, none of which is garbage
    leave(run(argv))


def run(argv: list[str] | None = None) -> int:
    try:
        console = Console()
        with Progress(console).watching():
            code = cli.main(argv, prog_name="tpuvid", standalone_mode=False, obj=console)
        return code if isinstance(code, int) else 0  # of a plugin's command: anything
    except click.exceptions.NoArgsIsHelpError as help_request:
        click.echo(help_request.format_message())
        return 0
    except click.ClickException as error:
        usage = f" (see {context.command_path} --help)" if (context := getattr(error, "ctx", None)) else ""
        return _fail(error.format_message().replace("\n", " ") + usage, error.exit_code)
    except (KeyboardInterrupt, click.Abort) as error:
        return _fail("interrupted", exit_code(isinstance(error, Terminated)))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone; nothing is left to say
        return 1
    except TpuvidError as error:
        return _fail(str(error), error.exit_code)
    except (
        BaseException
    ) as error:  # the last resort: a bug, a backend's failure or a plugin's exit, without a traceback for the user
        if os.environ.get(DEBUG_VARIABLE):
            raise
        return _fail(unexpected(error), 1)


def _fail(message: str, code: int) -> int:
    click.echo(f"tpuvid: error: {' '.join(message.splitlines())}", err=True)
    return code


@click.group(
    cls=Commands,
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-"), "help_option_names": ["-h", "--help"]},
)
@click.version_option(tpuvid.__version__, prog_name="tpuvid")
def cli() -> None:
    """Text-to-video inference on Google TPUs (and on GPUs and CPUs)."""


@cli.command("list-models")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def list_models(as_json: bool) -> None:
    """The models that are installed."""
    rows = [
        {
            "model": s.model_id, "family": s.family, "parameters": s.parameters,
            "size": f"{s.defaults.width}x{s.defaults.height}", "frames": s.defaults.num_frames,
            "steps": s.defaults.num_inference_steps, "checkpoint": s.checkpoint, "package": f"{p.package} {p.version}",
            "decoders": [OWN, *(d.name for q in registry().plugins for d in q.decoders if d.serves(s))],
        }
        for p in registry().plugins
        for s in p.models
    ]  # fmt: skip
    if as_json:
        broken = [{"plugin": p.name, "package": f"{p.package} {p.version}", "error": p.error} for p in registry().broken]
        conflicts = [asdict(conflict) for conflict in registry().conflicts]
        click.echo(json.dumps({"models": rows, "broken": broken, "conflicts": conflicts}, indent=2))
        return
    if not rows:
        click.echo("no models installed; try: pip install tpuvid-wan")
    else:
        cells = ([", ".join(v) if isinstance(v, list) else str(v) for v in row.values()] for row in rows)
        click.echo("\n".join(table(list(rows[0]), cells)))
    for problem in registry().problems:
        click.echo(f"warning: {problem}", err=True)


@cli.command()
@config_option
@model_option
@prompt_option
@click.option(
    "--prompts",
    "--prompt-file",
    "--prompt-path",
    type=prompts_type,
    help="A text file (a prompt per line), CSV or JSONL (prompt and settings of its own); - is stdin.",
)
@many_options
@settings_of("encode")
@denoising_options
@click.option(
    "--output",
    "-o",
    "--output-path",
    type=path_type,
    help="The mp4. Default: a name in --output-dir that says prompt, seed and time.",
)
@click.option("--output-dir", type=path_type, help="Folder for named files. [default: outputs]")
@save_frames_option
@metadata_options
@load_options_of("decode")
@pack_options
@overwrite_option
@load_options_of("encode")
@runtime_options
def generate(model: str, prompt: str | None, prompts: str | None, num_videos: int, batch_size: int, sweep: tuple[str, ...],
             more_sweep: tuple[str, ...], savepoint_every: int | None, resume: bool, preview_every: int | None,
             output: Path | None, output_dir: Path | None, save_frames: bool, no_metadata: bool, no_prompt_in_metadata: bool,
             overwrite: bool, **given: Any) -> int:  # fmt: skip
    """Prompt → mp4, in one go; or many prompts, or a sweep over settings."""
    from tpuvid.cli.generate import carry_out
    from tpuvid.runs.asked.requests import Keeping, plan_generation

    if more_sweep and not sweep:
        raise click.UsageError(f"Got unexpected extra argument ({' '.join(more_sweep)})", click.get_current_context())
    settings, options = split(given)
    options = _with_pack(options)
    keeping = Keeping(
        output=output, output_dir=output_dir, overwrite=overwrite, save_frames=save_frames,
        metadata=not no_metadata, prompt_in_metadata=not no_prompt_in_metadata,
    )  # fmt: skip
    generation = plan_generation(
        model, prompt=prompt, prompts=prompts, num_videos=num_videos, sweep=sweep + more_sweep, settings=settings,
        options=options, keeping=keeping, batch_size=batch_size, savepoint_every=savepoint_every, resume=resume,
        preview_every=preview_every,
    )  # fmt: skip
    return carry_out(generation, lambda: _load(model, options), click.get_current_context().find_root().obj)


@cli.command()
@config_option
@model_option
@required_prompt_option
@settings_of("encode")
@click.option("--output-dir", type=path_type, default=Path(STAGE_FOLDER), show_default=True)
@private_option
@pack_options
@overwrite_option
@load_options_of("encode")
@runtime_options
def encode(model: str, output_dir: Path, no_prompt_in_metadata: bool, overwrite: bool, **given: Any) -> None:
    """Stage 1: prompt → stage1_embeddings.safetensors."""
    from tpuvid.cli.messages import say_how
    from tpuvid.contract.settings import require_prompt
    from tpuvid.files.atomic import check_output
    from tpuvid.files.locks import locked
    from tpuvid.files.stage_files import CONFIG, EMBEDDINGS, check_config, private, save_conditioning
    from tpuvid.plugin.lookup import resolve_model

    require_prompt(given["prompt"])
    spec, checkpoint = resolve_model(model)
    settings, options = split(given)
    options = _with_pack(options)
    spec.configure(**settings)
    with locked(output_dir / CONFIG):
        check_output(output_dir / EMBEDDINGS, overwrite=overwrite)
        check_config(output_dir, overwrite=overwrite)
        checkpoint.require(spec.components["encode"])
        conditioning = _load(model, options).encode(**settings)
        conditioning = private(conditioning) if no_prompt_in_metadata else conditioning
        click.echo(f"embeddings: {save_conditioning(output_dir, conditioning, overwrite=overwrite)}")
    say_how(conditioning.history)


@cli.command()
@config_option
@stage_model_option
@click.option("--input-dir", type=path_type, default=Path(STAGE_FOLDER), show_default=True, help="Where stage 1 is.")
@denoising_options
@click.option("--output-dir", type=path_type, help="Default: --input-dir.")
@private_option
@pack_options
@overwrite_option
@runtime_options
def denoise(model: str | None, input_dir: Path, output_dir: Path | None, savepoint_every: int | None, resume: bool,
            preview_every: int | None, no_prompt_in_metadata: bool, overwrite: bool, **given: Any) -> int:  # fmt: skip
    """Stage 2: stage1_embeddings.safetensors → stage2_latents.safetensors."""
    from tpuvid.cli.messages import say_how
    from tpuvid.cli.signals import stoppable
    from tpuvid.files.atomic import check_output
    from tpuvid.files.locks import WORK_FOLDER, locked
    from tpuvid.files.stage_files import CONFIG, EMBEDDINGS, LATENTS, check_config, load_conditioning, private, save_latents
    from tpuvid.plugin.lookup import check_origin
    from tpuvid.runs.control import Cancelled, Control, was_terminated

    output_dir = output_dir or input_dir
    conditioning = load_conditioning(input_dir / EMBEDDINGS)
    conditioning = private(conditioning) if no_prompt_in_metadata else conditioning
    model, spec, checkpoint = _stage_model(model, input_dir / EMBEDDINGS, conditioning.model_id)
    settings, options = split(given)
    options = _with_pack(options)
    spec.configure(**settings)
    with locked(output_dir / CONFIG):
        check_output(output_dir / LATENTS, overwrite=overwrite)
        check_config(output_dir, overwrite=overwrite)
        check_origin("embeddings", conditioning, spec, checkpoint)
        checkpoint.require(spec.components["denoise"])
        with stoppable() as cancel:
            preview = output_dir / "stage2_preview.png"
            if preview_every:
                check_output(preview, overwrite=overwrite or resume)

            def keep(found: Sequence[Latents]) -> None:
                for latents in found:
                    save_latents(output_dir, latents, overwrite=overwrite)

            control = Control(
                cancel=cancel, savepoint_dir=output_dir / WORK_FOLDER, savepoint_every=savepoint_every, resume=resume,
                preview=preview if preview_every else None, preview_every=preview_every or 1,
                on_result=keep,
            )  # fmt: skip
            try:
                latents = _load(model, options).denoise(conditioning, control=control, **settings)
            except Cancelled as error:
                seed = f"--seed {error.seed} " if settings.get("seed") == -1 else ""
                click.echo(f"tpuvid: {error}; the same command with {seed}--resume goes on", err=True)
                return exit_code(was_terminated(cancel, error))
    click.echo(f"latents: {output_dir / LATENTS}")
    click.echo(f"seed: {latents.config.seed}")
    say_how(latents.history, "denoise")
    return 0


@cli.command()
@config_option
@stage_model_option
@click.option("--input-dir", type=path_type, default=Path(STAGE_FOLDER), show_default=True, help="Where stage 2 is.")
@settings_of("decode")
@click.option("--output-dir", type=path_type, help="Default: --input-dir.")
@save_frames_option
@metadata_options
@load_options_of("decode")
@pack_options
@overwrite_option
@runtime_options
def decode(model: str | None, input_dir: Path, output_dir: Path | None, save_frames: bool, no_metadata: bool,
           no_prompt_in_metadata: bool, overwrite: bool, **given: Any) -> None:  # fmt: skip
    """Stage 3: stage2_latents.safetensors → output_video.mp4."""
    from tpuvid.cli.messages import say_files, say_how
    from tpuvid.contract.settings import check_sampling
    from tpuvid.contract.values import Latents
    from tpuvid.files.locks import locked
    from tpuvid.files.stage_files import CONFIG, LATENTS, load_latents, read_config
    from tpuvid.plugin.lookup import check_origin
    from tpuvid.runs.outputs import Outputs

    file = load_latents(input_dir / LATENTS)
    beside = {} if file.checked else read_config(input_dir / CONFIG)  # a file with a checksum says all itself
    beside_model = beside.pop("model_id", None)
    if (count := len(file.tensors["latents"])) != 1:
        raise InputError(f"{file.path}: holds {count} videos; decode takes one, split the file")
    given_settings, options = split(given)
    model, spec, checkpoint = _stage_model(model, file.path, file.model_id or beside_model, decoder=options.decoder)
    options = _with_pack(options)
    config = spec.defaults.override(**(beside | dict(file.settings) | given_settings))
    check_sampling(config)
    if "fps" in spec.takes and (denoised := dict(file.settings).get("fps", config.fps)) != config.fps:
        raise InputError(
            f"fps={config.fps}: {spec.model_id} denoised these latents for {denoised}; leave it out, or denoise again"
        )
    outputs = Outputs(
        video=(output_dir or input_dir) / "output_video.mp4", overwrite=overwrite, save_frames=save_frames,
        metadata=not no_metadata, prompt_in_metadata=not no_prompt_in_metadata,
    )  # fmt: skip
    made = file.result() | {"model_id": file.model_id or beside_model or ""}
    latents = Latents(**made, config=config, prompts_sha256=file.prompts_sha256)
    with locked(outputs.video):
        outputs.check()
        check_origin("latents", latents, spec, checkpoint)
        checkpoint.require(spec.components["decode"])
        written = outputs.write(_load(model, options), latents)
    say_files(outputs.files, written.record, written.frames)
    say_how(written.record["history"], "decode")


@cli.command()
@click.argument("video", type=path_type)
@click.option("--output", "-o", "--output-path", type=path_type, help="The mp4. [default: the video's name with -reproduced]")
@click.option("--model", help="In the place of the recorded one, for example where the same weights are.")
@prompt_again_options
@load_options("mesh")
@overwrite_option
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def reproduce(video: Path, output: Path | None, model: str | None, mesh: str | None, overwrite: bool, as_json: bool,
              **prompts: str | None) -> None:  # fmt: skip
    """Make a video again from the record in it; say what differs, and how far the new one is from it."""
    from tpuvid.files.locks import locked
    from tpuvid.runs.kept.record import printable
    from tpuvid.runs.outputs import Outputs
    from tpuvid.runs.reproduction import Recorded, render

    recorded = Recorded.read(video, model=model, prompts=prompts)
    outputs = Outputs(
        video=output or video.with_name(f"{video.stem}-reproduced.mp4"), overwrite=overwrite,
        prompt_in_metadata="prompt" in recorded.record,
    )  # fmt: skip
    options = replace(recorded.options, mesh=mesh) if mesh else recorded.options
    with locked(outputs.video):
        outputs.check()
        found = recorded.run(lambda: _load(recorded.model, options), outputs)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
        return
    click.echo(f"video: {found.video}")
    click.echo(printable(render(found)))


@cli.command("inspect")
@click.argument("path", type=path_type)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def inspect_command(path: Path, as_json: bool) -> None:
    """How an mp4 was made (all of its record with -v); what a stage file, a folder of them, a pack or a checkpoint holds.

    Those have tensors, settings, programs.
    """
    from tpuvid.cli.describe import describe, render
    from tpuvid.runs.kept.record import printable

    about, console = describe(path), click.get_current_context().find_root().obj
    click.echo(json.dumps(about, indent=2) if as_json else printable(render(about, all_of_it=console.level >= VERBOSE)))


@cli.command("compare")
@click.argument("a", type=path_type)
@click.argument("b", type=path_type)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def compare_command(a: Path, b: Path, as_json: bool) -> None:
    """How far video B is from video A: PSNR, SSIM, largest difference, worst frame.

    Each is an .mp4, a file of frames or latents, or a folder that holds one.
    """
    from tpuvid.runs.compare import compare, render

    found = compare(a, b)
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else render(found))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor(as_json: bool) -> int:
    """Versions, devices, plugins, and what is wrong. Exit code 1 if something is."""
    from tpuvid.cli.doctor import examine, render

    report = examine()
    click.echo(json.dumps(report, indent=2) if as_json else render(report))
    return 1 if report["problems"] else 0


def _with_pack(options: Options) -> Options:
    """--pack read, and found to be whole before anything heavy is imported."""
    from tpuvid.compute.packs.pack import with_pack

    options.check()
    return with_pack(options)


def _load(model: str, options: Options) -> Pipeline:
    with current().phase("start"):  # jax and torch are imported here
        pipe = tpuvid.load(model, keep_programs=True, **options.given())
    if not gc.get_freeze_count():  # what is imported is no garbage: freeing a stage looks for cycles in what comes after
        gc.freeze()
    return pipe


def _stage_model(
    given: str | None, file: Path, recorded: str | None, *, decoder: str | None = None
) -> tuple[str, ModelSpec, Checkpoint]:
    """The model that a stage runs with: what the user says, or else what made the stage file."""
    from tpuvid.plugin.lookup import resolve_model

    if given is not None:
        return given, *resolve_model(given, decoder=decoder)
    if not recorded:
        raise InputError(f"{file}: names no model; pass --model")
    try:
        resolve_model(recorded)
    except TpuvidError as error:
        raise InputError(f"{file}: was made by {recorded}, which can't be had here ({error}); pass --model") from None
    return recorded, *resolve_model(recorded, decoder=decoder)
