"""The ``tpuvid`` command: argv → settings → the Python API → a line that says where the result stands.

Nothing heavy is imported before the arguments have been checked.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import tpuvid
from tpuvid.errors import InputError, TpuvidError
from tpuvid.options import (
    config_option,
    echo_table,
    encoder_options,
    fps_option,
    loop_options,
    lora_options,
    mesh_option,
    model_option,
    overwrite_option,
    pack_options,
    path_type,
    prompt_options,
    runtime_options,
    sampling_options,
    save_frames_option,
    saving_options,
    split,
    stage_model_option,
    vae_tiling_option,
)
from tpuvid.plan.commands import COMMANDS
from tpuvid.registry import registry
from tpuvid.stages import GenerationConfig

if TYPE_CHECKING:
    from tpuvid.checkpoint import Checkpoint
    from tpuvid.pipeline import Pipeline
    from tpuvid.stages import Conditioning, Latents, ModelSpec, Video

EXIT_SOME_FAILED = 3
EXIT_INTERRUPTED = 130
DEBUG_VARIABLE = "TPUVID_DEBUG"
STAGE_FOLDER = "stage_outputs"


def main(argv: list[str] | None = None) -> None:
    """Run the command; every failure is one line on stderr and an exit code."""
    sys.exit(run(argv))


def run(argv: list[str] | None = None) -> int:
    try:
        return cli.main(argv, prog_name="tpuvid", standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as help_request:
        click.echo(help_request.format_message())
        return 0
    except click.ClickException as error:
        usage = f" (see {error.ctx.command_path} --help)" if getattr(error, "ctx", None) else ""
        return _fail(error.format_message().replace("\n", " ") + usage, error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone; nothing is left to say
        return 1
    except TpuvidError as error:
        return _fail(str(error), error.exit_code)
    except Exception as error:  # the last resort: a bug or a backend's failure, without a traceback for the user
        if os.environ.get(DEBUG_VARIABLE):
            raise
        return _fail(_unexpected(error), 1)


def _fail(message: str, code: int) -> int:
    click.echo(f"tpuvid: error: {' '.join(message.splitlines())}", err=True)
    return code


def _unexpected(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
        return f"out of memory ({first}); use fewer frames, a smaller size, --dtype bfloat16 or more devices"
    return f"{type(error).__name__}: {first} (unexpected; {DEBUG_VARIABLE}=1 shows the traceback)"


@click.group(
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-"), "help_option_names": ["-h", "--help"]}
)
@click.version_option(tpuvid.__version__, prog_name="tpuvid")
def cli() -> None:
    """Text-to-video inference on Google TPUs (and on GPUs and CPUs)."""


@dataclass(frozen=True)
class Outputs:
    """The files that one video is written to."""

    video: Path
    overwrite: bool
    save_frames: bool

    @property
    def files(self) -> dict[str, Path]:
        from tpuvid.artifacts import FRAMES

        files = {
            "video": self.video,
            "contact sheet": self.video.with_suffix(".png"),
            "settings": self.video.with_suffix(".json"),
        }
        return files | ({"frames": self.video.with_name(FRAMES)} if self.save_frames else {})

    def check(self) -> None:
        from tpuvid.artifacts import check_output

        if self.video.suffix != ".mp4":
            raise InputError(f"{self.video}: videos are written as .mp4; give a name that ends so")
        for path in self.files.values():
            check_output(path, overwrite=self.overwrite)

    def write(self, video: Video) -> None:
        from tpuvid.artifacts import save_frames, write_json
        from tpuvid.video import save_contact_sheet

        about = {"model_id": video.model_id, **video.config.to_dict()}
        video.save(self.video, overwrite=self.overwrite)
        save_contact_sheet(video.frames[0], self.files["contact sheet"], overwrite=self.overwrite)
        if self.save_frames:
            save_frames(self.video.parent, video.frames, about, overwrite=self.overwrite)
        write_json(self.files["settings"], about | {"history": video.history}, overwrite=self.overwrite)
        for name, path in self.files.items():
            click.echo(f"{name}: {path}")
        made = video.frames.shape[1]
        if made != video.config.num_frames:
            click.echo(
                f"frames: {made}; {video.config.num_frames} were asked for, and this VAE makes {made} of as many latents"
            )


@cli.command("list-models")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def list_models(as_json: bool) -> None:
    """The models that are installed."""
    rows = [
        {
            "model": s.model_id, "family": s.family, "parameters": s.parameters,
            "size": f"{s.defaults.width}x{s.defaults.height}", "frames": s.defaults.num_frames,
            "steps": s.defaults.num_inference_steps, "checkpoint": s.checkpoint, "package": f"{p.package} {p.version}",
        }
        for p in registry().plugins
        for s in p.models
    ]  # fmt: skip
    broken = [{"plugin": p.name, "package": f"{p.package} {p.version}", "error": p.error} for p in registry().broken]
    if as_json:
        click.echo(json.dumps({"models": rows, "broken": broken}, indent=2))
        return
    if not rows:
        click.echo("no models installed; try: pip install tpuvid-wan")
    else:
        echo_table([list(rows[0]), *([str(v) for v in row.values()] for row in rows)])
    for plugin in broken:
        click.echo(f"warning: plugin {plugin['plugin']} ({plugin['package']}) does not load: {plugin['error']}", err=True)


@cli.command()
@config_option
@model_option
@click.option("--prompt", help="What the video shows.")
@click.option("--prompt-file", "--prompt-path", type=path_type, help="One prompt per line; each gives a video.")
@prompt_options
@sampling_options
@saving_options
@lora_options
@mesh_option
@loop_options
@fps_option
@click.option(
    "--output", "-o", type=path_type, help="The mp4. Default: a name in --output-dir that says prompt, seed and time."
)
@click.option("--output-dir", type=path_type, help="Folder for a named file. [default: outputs]")
@save_frames_option
@vae_tiling_option
@pack_options
@overwrite_option
@encoder_options
@runtime_options
def generate(model: str, prompt: str | None, prompt_file: Path | None, output: Path | None, output_dir: Path | None,
             save_frames: bool, overwrite: bool, **given: Any) -> int:  # fmt: skip
    """Prompt → mp4, in one go."""
    from tpuvid.checkpoint import resolve_model
    from tpuvid.packs import settings_key

    prompts = _prompts(prompt, prompt_file)
    if output and output_dir:
        raise InputError(f"give either --output={output} or --output-dir={output_dir}")
    if output and len(prompts) > 1:
        raise InputError(f"--output names one file, {prompt_file} holds {len(prompts)} prompts; use --output-dir")
    if save_frames and len(prompts) > 1:
        raise InputError(
            f"--save-frames writes one stage3_frames.safetensors, {prompt_file} holds {len(prompts)} prompts; run them one by one"
        )
    spec, checkpoint = resolve_model(model)
    settings, options = split(given)
    options |= _read_pack(options)
    configs = [spec.configure(prompt=p, **settings).with_drawn_seed() for p in prompts]
    names = [_file_name(config, i if len(prompts) > 1 else None) for i, config in enumerate(configs)]
    outputs = [Outputs(output or (output_dir or Path("outputs")) / name, overwrite, save_frames) for name in names]
    for out in outputs:
        out.check()
    if pack := options.get("pack"):
        for config in configs:
            pack.check(settings_key(spec, config))
        pack.require_trust()
    for stage in spec.components.values():
        checkpoint.require(stage)  # after all that is free to check: this may fetch
    pipe = _load(model, options)
    pipe.verify()
    configs = [pipe.resolve(config) for config in configs]
    for config in configs:
        pipe.check_pack(config)
    failures = _generate_all(pipe, configs, outputs)
    for config, error in failures:
        click.echo(f"tpuvid: error: {config.prompt!r}: {error}", err=True)
    return EXIT_SOME_FAILED if failures else 0


def _generate_all(
    pipe: Pipeline, configs: list[GenerationConfig], outputs: list[Outputs]
) -> list[tuple[GenerationConfig, str]]:
    """Every prompt through each stage before the next stage loads; what fails doesn't stop the others."""
    done: list[Any] = list(configs)
    failures = []

    def each(work: Callable[[int, Any], Any]) -> None:
        for i, value in enumerate(done):
            if value is None:
                continue
            try:
                done[i] = work(i, value)
            except Exception as error:  # whatever stops one video is that video's
                if len(done) == 1:
                    raise
                done[i] = None
                failures.append((configs[i], str(error) if isinstance(error, TpuvidError) else _unexpected(error)))

    def save(i: int, latents: Latents) -> None:
        video = pipe.decode(latents)
        outputs[i].write(video)
        click.echo(f"seed: {configs[i].seed}")
        _say_how(latents)
        _say_pack(video)

    each(lambda i, config: pipe.encode_config(config))
    pipe.free()
    each(lambda i, conditioning: pipe.denoise_config(conditioning, configs[i]))
    pipe.free()
    each(save)
    return failures


@cli.command()
@config_option
@model_option
@click.option("--prompt", required=True, help="What the video shows.")
@prompt_options
@click.option("--output-dir", type=path_type, default=Path(STAGE_FOLDER), show_default=True)
@pack_options
@overwrite_option
@encoder_options
@runtime_options
def encode(model: str, output_dir: Path, overwrite: bool, **given: Any) -> None:
    """Stage 1: prompt → stage1_embeddings.safetensors."""
    from tpuvid.artifacts import EMBEDDINGS, check_config, check_output, save_conditioning
    from tpuvid.checkpoint import resolve_model

    spec, checkpoint = resolve_model(model)
    settings, options = split(given)
    options |= _read_pack(options)
    spec.configure(**settings)
    check_output(output_dir / EMBEDDINGS, overwrite=overwrite)
    check_config(output_dir, overwrite=overwrite)
    checkpoint.require(spec.components["encode"])
    conditioning = _load(model, options).encode(**settings)
    click.echo(f"embeddings: {save_conditioning(output_dir, conditioning, overwrite=overwrite)}")
    _say_pack(conditioning)


@cli.command()
@config_option
@stage_model_option
@click.option("--input-dir", type=path_type, default=Path(STAGE_FOLDER), show_default=True, help="Where stage 1 is.")
@sampling_options
@saving_options
@lora_options
@mesh_option
@loop_options
@fps_option
@click.option("--output-dir", type=path_type, help="Default: --input-dir.")
@pack_options
@overwrite_option
@runtime_options
def denoise(model: str | None, input_dir: Path, output_dir: Path | None, overwrite: bool, **given: Any) -> None:
    """Stage 2: stage1_embeddings.safetensors → stage2_latents.safetensors."""
    from tpuvid.artifacts import EMBEDDINGS, LATENTS, check_config, check_output, load_conditioning, save_latents
    from tpuvid.checkpoint import check_origin

    output_dir = output_dir or input_dir
    conditioning = load_conditioning(input_dir / EMBEDDINGS)
    model, spec, checkpoint = _stage_model(model, input_dir / EMBEDDINGS, conditioning.model_id)
    settings, options = split(given)
    options |= _read_pack(options)
    spec.configure(**settings)
    check_output(output_dir / LATENTS, overwrite=overwrite)
    check_config(output_dir, overwrite=overwrite)
    check_origin("embeddings", conditioning, spec, checkpoint)
    checkpoint.require(spec.components["denoise"])
    latents = _load(model, options).denoise(conditioning, **settings)
    click.echo(f"latents: {save_latents(output_dir, latents, overwrite=overwrite)}")
    click.echo(f"seed: {latents.config.seed}")
    _say_how(latents)
    _say_pack(latents, "denoise")


@cli.command()
@config_option
@stage_model_option
@click.option("--input-dir", type=path_type, default=Path(STAGE_FOLDER), show_default=True, help="Where stage 2 is.")
@fps_option
@click.option("--output-dir", type=path_type, help="Default: --input-dir.")
@save_frames_option
@vae_tiling_option
@pack_options
@overwrite_option
@runtime_options
def decode(
    model: str | None, input_dir: Path, output_dir: Path | None, save_frames: bool, overwrite: bool, **given: Any
) -> None:
    """Stage 3: stage2_latents.safetensors → output_video.mp4."""
    from tpuvid.artifacts import CONFIG, LATENTS, load_latents, read_config
    from tpuvid.checkpoint import check_origin
    from tpuvid.stages import Latents, check_sampling

    array, file = load_latents(input_dir / LATENTS)
    beside = read_config(input_dir / CONFIG)
    beside_model = beside.pop("model_id", None)
    if len(array) != 1:
        raise InputError(f"{file.path}: holds {len(array)} videos; decode takes one, split the file")
    model, spec, checkpoint = _stage_model(model, file.path, file.model_id or beside_model)
    given_settings, options = split(given)
    options |= _read_pack(options)
    config = spec.defaults.override(**(beside | dict(file.settings) | given_settings))
    check_sampling(config)
    outputs = Outputs((output_dir or input_dir) / "output_video.mp4", overwrite, save_frames)
    outputs.check()
    latents = Latents(
        model_id=file.model_id or beside_model or "",
        latents=array,
        config=config,
        history=file.history,
        fingerprint=file.fingerprint,
    )
    check_origin("latents", latents, spec, checkpoint)
    checkpoint.require(spec.components["decode"])
    video = _load(model, options).decode(latents)
    outputs.write(video)
    _say_pack(video, "decode")


@cli.command("inspect")
@click.argument("path", type=path_type)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def inspect_command(path: Path, as_json: bool) -> None:
    """What a stage file, a folder of them, a pack or a checkpoint holds: tensors, shapes, dtypes, settings, programs."""
    from tpuvid.describe import describe, render

    about = describe(path)
    click.echo(json.dumps(about, indent=2) if as_json else render(about))


@cli.command("compare")
@click.argument("a", type=path_type)
@click.argument("b", type=path_type)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def compare_command(a: Path, b: Path, as_json: bool) -> None:
    """How far video B is from video A: PSNR, SSIM, largest difference, worst frame.

    Each is an .mp4, a file of frames or latents, or a folder that holds one.
    """
    from tpuvid.compare import compare, render

    found = compare(a, b)
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else render(found))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor(as_json: bool) -> int:
    """Versions, devices, plugins, and what is wrong. Exit code 1 if something is."""
    from tpuvid.doctor import examine, render

    report = examine()
    click.echo(json.dumps(report, indent=2) if as_json else render(report))
    return 1 if report["problems"] else 0


def _say_how(latents: Latents) -> None:
    """What the window showed, which steps the cache served, and where the profile is."""
    about = latents.history["denoise"]
    if window := about.get("window"):
        click.echo(f"window: a token sees {window}")
    if cache := about.get("cache"):
        click.echo(f"cache: {cache['name']}: full steps {cache['full']}; cached steps {cache['cached']}")
    if profile := about.get("profile"):
        click.echo(f"profile: {profile} (*.xplane.pb for XProf, perfetto_trace.json.gz for Perfetto)")


def _say_pack(result: Conditioning | Latents | Video, *stages: str) -> None:
    """What came out of the pack in these stages (by default all so far), and what had to be compiled nevertheless."""
    history = [result.history[stage] for stage in stages or result.history]
    for note in ("loaded from pack", "compiled beside the pack"):
        if programs := [about[note] for about in history if note in about]:
            click.echo(f"{note}: {'; '.join(programs)}")


def _read_pack(options: Mapping[str, Any]) -> dict[str, Any]:
    """--pack, found to be whole before anything heavy is imported."""
    from tpuvid.packs import read_pack

    if options["pack"] is None:
        if options["trust_pack"]:
            raise InputError("--trust-pack: there is no pack to trust; add --pack FILE")
        return {}
    return {"pack": read_pack(options["pack"], trusted=options["trust_pack"])}


def _load(model: str, options: Mapping[str, Any]) -> Pipeline:
    from tpuvid.progress import ConsoleProgress

    progress = ConsoleProgress()
    with progress.phase("start"):  # jax and torch are imported here
        return tpuvid.load(model, progress=progress, **options)


def _stage_model(given: str | None, file: Path, recorded: str | None) -> tuple[str, ModelSpec, Checkpoint]:
    """The model that a stage runs with: what the user says, or else what made the stage file."""
    from tpuvid.checkpoint import resolve_model

    if given is not None:
        return given, *resolve_model(given)
    if not recorded:
        raise InputError(f"{file}: names no model; pass --model")
    try:
        return recorded, *resolve_model(recorded)
    except TpuvidError as error:
        raise InputError(f"{file}: was made by {recorded}, which can't be had here ({error}); pass --model") from None


def _prompts(prompt: str | None, file: Path | None) -> list[str]:
    if (prompt is None) == (file is None):
        raise InputError("give either --prompt or --prompt-file")
    if prompt is not None:
        return [prompt]
    try:
        prompts = [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: can't be read ({error}); needs a text file with one prompt per line") from None
    if not prompts:
        raise InputError(f"{file}: holds no prompt; needs one per line")
    return prompts


def _file_name(config: GenerationConfig, index: int | None) -> str:
    """Prompt, seed and time: "a-red-circle_42_20261120-154500.mp4"."""
    slug = re.sub(r"[^a-z0-9]+", "-", config.prompt.lower()).strip("-")[:60].rstrip("-") or "video"
    number = "" if index is None else f"_{index + 1:03d}"
    return f"{slug}_{config.seed}_{time.strftime('%Y%m%d-%H%M%S')}{number}.mp4"


for command in COMMANDS:
    cli.add_command(command)
