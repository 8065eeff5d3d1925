"""The options of the ``tpuvid`` command, each defined once, the YAML file that may give them, and what is done with them."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from tpuvid.contract.layout import MeshConfig
from tpuvid.contract.settings import GenerationConfig
from tpuvid.errors import InputError

SETTINGS = tuple(f.name for f in fields(GenerationConfig))


def _from_yaml(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Flags that a YAML file gives: they stand in for defaults, so that the command line wins."""
    if path is None:
        return
    import yaml

    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: is no readable YAML ({reason})") from None
    if values is None:
        return
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds a {type(values).__name__}; needs lines of the form 'num_frames: 81'")
    # one file may serve all commands: what only another one has is left to that one
    group = context.find_root().command
    assert isinstance(group, click.Group)
    own = _flags(context.command)
    known = {flag: option for command in group.commands.values() for flag, option in _flags(command).items()} | own
    defaults = {}
    for key, value in values.items():
        flag = str(key).replace("_", "-")
        if flag not in known:
            near = difflib.get_close_matches(flag, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            raise InputError(f"{path}: {key!r} is no flag of tpuvid; {hint}")
        if isinstance(value, (dict, list)) or (isinstance(value, bool) and not known[flag].is_flag):
            raise InputError(f"{path}: {key}={value!r}: needs one {known[flag].type.name}, as on the command line")
        if flag in own and value is not None:
            text = value if isinstance(value, bool) else str(value)
            defaults[own[flag].name] = text.split() if own[flag].multiple and isinstance(text, str) else text
    context.default_map = defaults


def _flags(command: click.Command) -> dict[str, click.Option]:
    """The options of a command that a YAML file may give, by every name that they have on the command line."""
    options = [p for p in command.params if isinstance(p, click.Option) and p.name not in ("config_file", "help", "as_json")]
    return {name.lstrip("-"): option for option in options for name in option.opts if name.startswith("--")}


def _usable_folder(context: click.Context, _: click.Parameter, folder: Path | None) -> Path | None:
    if folder is not None:
        from tpuvid.files.atomic import check_output

        check_output(folder / "1", overwrite=True)  # made when there is something to put into it
    return folder


def _checked_mesh(context: click.Context, _: click.Parameter, mesh: str | None) -> str | None:
    if mesh is not None:
        MeshConfig.parse(mesh)
    return mesh


def _options(*decorators: Callable) -> Callable:
    def apply(command: Callable) -> Callable:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


class _FilePath(click.Path):
    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        if "\0" in str(value):
            self.fail("holds a null byte, which no name of a file has", param, context)
        try:
            os.stat(value)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                self.fail(f"{str(value)[:40]}…: is longer than a file's name can be; choose a shorter one", param, context)
        return super().convert(value, param, context)


path_type = _FilePath(path_type=Path)
prompts_type = _FilePath(allow_dash=True)
model_option = click.option("--model", required=True, help="Registered id, local diffusers folder, or Hub id.")
stage_model_option = click.option("--model", help="Default: the model that made the stage file.")
length_option = click.option("--max-sequence-length", type=int, help="Text tokens; longer prompts are cut.")
prompt_options = _options(
    click.option("--negative-prompt", help="What to steer away from."),
    length_option,
)
topology_option = click.option(
    "--topology",
    required=True,
    help="A TPU slice (v5e-8, v5p-8, v6e-1, v6e-8, v6e-16, tpu7x-8, …), or this machine's cpu or gpu.",
)
size_options = _options(
    click.option("--height", type=int, help="Pixels."),
    click.option("--width", type=int, help="Pixels."),
    click.option("--num-frames", type=int),
)
steps_option = click.option("--num-inference-steps", "--steps", type=int, help="Denoising steps.")
guidance_option = click.option("--guidance-scale", type=float, help="Classifier-free guidance; 1.0 switches it off.")
sampling_options = _options(
    size_options,
    steps_option,
    guidance_option,
    click.option("--flow-shift", type=float, help="Timestep shift; default by resolution or checkpoint."),
    click.option(
        "--use-dynamic-cfg",
        is_flag=True,
        default=None,
        help="CogVideoX: guidance that changes with the timestep, as in diffusers.",
    ),
    click.option("--seed", type=int, help="Same seed, same video; -1 draws one. [default: 42]"),
)
saving_options = _options(
    click.option(
        "--cache", metavar="NAME", help="Reuse parts of one denoising step in the next ones: deepcache, or a plugin's."
    ),
    click.option("--cache-start-step", type=int, help="First step that may be cached. [default: 11]"),
    click.option("--cache-end-step", type=int, help="From this step on, none is cached. [default: 45]"),
    click.option("--cache-step-interval", type=int, help="Between them, one step in so many is full. [default: 4]"),
    click.option(
        "--window-size",
        help="In self-attention, let a token see so many frames before and after its own (16 or frames=16; tokens=8192).",
    ),
)
mesh_option = click.option(
    "--mesh", callback=_checked_mesh, help="Layout of the denoiser like dp=2,tp=4. Default by devices, heads and widths."
)
fps_option = click.option("--fps", type=int, help="Frames per second of the mp4.")
save_frames_option = click.option("--save-frames", is_flag=True, help="Also write stage3_frames.safetensors.")
encoder_options = _options(
    click.option(
        "--text-encoder-device", type=click.Choice(["device", "cpu"]), default="device", show_default=True,
        help="Where text encoders run: on the accelerator, which they leave before denoising, or on the CPU.",
    ),
)  # fmt: skip
control_options = _options(
    click.option(
        "--checkpoint-every", type=click.IntRange(1), help="Keep the state of denoising every so many steps, for --resume."
    ),
    click.option("--resume", is_flag=True, help="Go on where the same command was stopped or killed."),
    click.option(
        "--preview", "preview_every", type=click.IntRange(1),
        help="Every so many steps, show what the video is going to be in an animated PNG.",
    ),
)  # fmt: skip
many_options = _options(
    click.option("--num-videos", type=click.IntRange(1, 10_000), default=1, show_default=True,
                 help="Of each prompt, with seeds that follow one another."),
    click.option("--batch-size", type=click.IntRange(1, 1024), default=1, show_default=True,
                 help="Videos of one size that a denoising step computes together."),
    click.option("--sweep", multiple=True, metavar="SETTING=VALUES [SETTING=VALUES]...",
                 help="Every combination of values: --sweep seed=0..7 guidance_scale=4,5,6"),
    click.argument("more_sweep", metavar="", nargs=-1),
)  # fmt: skip
private_option = click.option("--no-prompt-in-metadata", is_flag=True, help="No file, and no file's name, says the prompts.")
metadata_options = _options(
    click.option("--no-metadata", is_flag=True, help="Neither a record of how it was made in the mp4, nor a .json beside it."),
    private_option,
)
loop_options = _options(
    click.option("--warmup-steps", type=click.IntRange(0), default=0, show_default=True, help="Runs before the first step."),
    click.option("--profile", type=path_type, callback=_usable_folder, help="Folder for a JAX profile of denoising steps."),
)
vae_tiling_option = click.option(
    "--vae-tiling", is_flag=True, help="Decode in overlapping tiles: less device memory, slightly other frames."
)
decoder_option = click.option(
    "--decoder", help="Another decoder than the model's own; tpuvid list-models says which there are."
)
pack_options = _options(
    click.option("--pack", type=path_type, help="File of tpuvid compile: its programs need not be compiled."),
    click.option("--trust-pack", is_flag=True, help="Run the machine code in --pack: say so if you made it or trust who did."),
)
lora_options = _options(
    click.option("--lora-path", type=path_type, help="A LoRA (safetensors) to merge into the diffusion model."),
    click.option("--lora-scale", type=float, default=1.0, show_default=True),
)
denoising_options = _options(
    sampling_options, saving_options, lora_options, mesh_option, control_options, loop_options, fps_option
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace files that exist.")
config_option = click.option(
    "--config", "config_file", type=path_type, is_eager=True, expose_value=False, callback=_from_yaml,
    help="YAML file of these settings; flags win.",
)  # fmt: skip
shape_options = _options(
    click.option("--heads", type=click.IntRange(1), help="Per device."),
    click.option("--queries", type=click.IntRange(1), help="Tokens."),
    click.option("--keys", type=click.IntRange(1), help="Tokens."),
    click.option("--head-dim", type=click.IntRange(1)),
)
search_options = _options(
    click.option("--jobs", type=click.IntRange(1), help="Compiles at a time. Default by cores and free memory."),
    click.option("--max-candidates", type=click.IntRange(1), default=24, show_default=True, help="Per shape."),
)
runtime_options = _options(
    click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), help="Default: bfloat16; float32 on a CPU."),
    click.option(
        "--attention-backend",
        type=click.Choice(["auto", "xla", "flash", "flash-smooth-k", "flash-int8", "splash", "cudnn"]),
        default="auto",
        show_default=True,
        help="flash-int8 is faster and less exact: see docs/attention.md.",
    ),
)


def split(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flags as (settings that were given, options for `tpuvid.load`)."""
    settings = {name: value for name, value in given.items() if name in SETTINGS and value is not None}
    return settings, {name: value for name, value in given.items() if name not in SETTINGS}


def echo_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
