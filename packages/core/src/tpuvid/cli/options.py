"""The options of the ``tpuvid`` command, each defined once, the YAML file that may give them, and what is done with them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from tpuvid.contract.options import OPTIONS, Options
from tpuvid.contract.paths import path_of
from tpuvid.contract.settings import SETTINGS
from tpuvid.contract.stages import STAGES
from tpuvid.contract.table import Setting
from tpuvid.contract.wording import suggestion
from tpuvid.errors import InputError


def _from_yaml(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Flags that a YAML file gives: they stand in for defaults, so that the command line wins."""
    if path is None:
        return
    from tpuvid.files.texts import read_yaml_text

    try:
        values = read_yaml_text(path, path.read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read ({error})") from None
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
            raise InputError(f"{path}: {key!r} is no flag of tpuvid; {suggestion(flag, sorted(known))}")
        several = known[flag].multiple and isinstance(value, list) and all(isinstance(each, str) for each in value)
        if isinstance(value, (dict, list)) and not several:
            raise InputError(f"{path}: {key}={value!r}: needs one {known[flag].type.name}, as on the command line")
        if flag in own and value is not None:
            name = own[flag].name
            if name in defaults:
                raise InputError(f"{path}: {key} is another name of what stands there already; say it once")
            defaults[name] = value.split() if own[flag].multiple and isinstance(value, str) else value
    context.default_map = defaults


def _flags(command: click.Command) -> dict[str, click.Option]:
    """The options of a command that a YAML file may give, by every name that they have on the command line."""
    options = [p for p in command.params if isinstance(p, click.Option) and p.name not in ("config_file", "help", "as_json")]
    return {name.lstrip("-"): option for option in options for name in option.opts if name.startswith("--")}


def _usable_folder(context: click.Context, _: click.Parameter, folder: Path | None) -> Path | None:
    if folder is not None:
        from tpuvid.files.atomic import check_folder, check_output

        if folder.is_dir():
            check_folder(folder)
        else:
            check_output(folder / "1", overwrite=True)  # made when there is something to put into it
    return folder


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
        value = str(path_of(value)) if str(value).startswith("~") else value
        try:
            os.stat(value)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                self.fail(f"{str(value)[:40]}…: is longer than a file's name can be; choose a shorter one", param, context)
        return super().convert(value, param, context)


path_type = _FilePath(path_type=Path)
prompts_type = _FilePath(allow_dash=True)


def setting_options(which: Callable[[Setting], bool], **about: Any) -> Callable:
    """Flags of the settings that `which` chooses; what isn't given is None, so that the model's own holds."""
    return _options(*(_option(each, about) for each in SETTINGS.values() if which(each)))


def settings_of(stage: str) -> Callable:
    """Flags of the settings that are chosen with `stage`, the first that they enter. Who needs a prompt says so itself."""
    return setting_options(lambda each: each.enters[0] == stage and each.name != "prompt")


def load_options(*names: str) -> Callable:
    """Flags of options of `tpuvid.load`."""
    return _options(*(_option(OPTIONS[name], _of_an_option(OPTIONS[name])) for name in names))


def load_options_of(*stages: str) -> Callable:
    """Flags of the options that the results of `stages`, and of no other, depend on."""
    return load_options(*(name for name, each in OPTIONS.items() if each.enters == stages))


def _option(each: Setting, about: Mapping[str, Any]) -> Callable:
    kind = {"is_flag": True, "default": None} if each.kind is bool else {"type": None if each.kind is str else each.kind}
    help = f"{each.help} [default: {each.default}]" if each.show_default else each.help
    return click.option(*each.flags, **{**kind, "metavar": each.metavar, "help": help, **about})


def _of_an_option(each: Setting) -> dict[str, Any]:
    """What is checked as soon as it is read, with its default, which is the same for all models."""
    about: dict[str, Any] = {"help": each.help, "default": each.default, "show_default": each.show_default}
    if each.choices:
        return about | {"type": click.Choice(each.choices)}
    if each.kind is int and each.range:
        return about | {"type": click.IntRange(*each.range)}
    if each.kind in (Path, Any):
        return about | {"type": path_type, "callback": _usable_folder if each.name == "profile" else None}
    return about | {"callback": _readable(each)}


def _readable(each: Setting) -> Callable:
    def check(context: click.Context, _: click.Parameter, value: Any) -> Any:
        if value is not None and each.reads is not None:
            each.reads(value)
        return value

    return check


model_option = click.option("--model", "--model-path", required=True, help="Registered id, local diffusers folder, or Hub id.")
stage_model_option = click.option("--model", "--model-path", help="Default: the model that made the stage file.")
topology_option = click.option(
    "--topology",
    required=True,
    help="A TPU slice (v5e-8, v5p-8, v6e-1, v6e-8, v6e-16, tpu7x-8, …), or this machine's cpu or gpu.",
)
prompt_option = setting_options(lambda each: each.name == "prompt")
required_prompt_option = setting_options(lambda each: each.name == "prompt", required=True)
prompt_again_options = setting_options(lambda each: each.private, help="Where the record leaves it out.")
size_options = setting_options(lambda each: each.name in ("height", "width", "num_frames"))  # what a model's `SizeRules` name
save_frames_option = click.option("--save-frames", is_flag=True, help="Also write stage3_frames.safetensors.")
control_options = _options(
    click.option(
        "--savepoint-every", "--checkpoint-every", type=click.IntRange(1),
        help="Keep the state of denoising every so many steps, for --resume.",
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
pack_options = load_options("pack", "trust_pack")
runtime_options = load_options_of(*STAGES)
denoising_options = _options(
    settings_of("denoise"),
    load_options_of("denoise"),
    control_options,
    load_options("warmup_steps", "profile"),
    settings_of("decode"),
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


def split(given: Mapping[str, Any]) -> tuple[dict[str, Any], Options]:
    """Flags as (settings that were given, options for `tpuvid.load`)."""
    settings = {name: value for name, value in given.items() if name in SETTINGS and value is not None}
    return settings, Options(**{name: value for name, value in given.items() if name not in SETTINGS})
