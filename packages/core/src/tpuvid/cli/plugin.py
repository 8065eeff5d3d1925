"""``tpuvid plugin``: argv → `new_plugin` and `tpuvid.testing.check` → lines."""

from __future__ import annotations

import json
from pathlib import Path

import click

from tpuvid.cli.commands import Command
from tpuvid.cli.options import path_type
from tpuvid.plugin.new import FAMILIES, new_plugin, next_steps


@click.group()
def plugin() -> None:
    """Write a plugin: a package that adds a model."""


@plugin.command(cls=Command)
@click.argument("name")
@click.option(
    "--family", type=click.Choice(tuple(FAMILIES)), default="blank", show_default=True,
    help="What it begins with: modules of its own, or the stages of tpuvid-wan or tpuvid-cogvideox to change.",
)  # fmt: skip
@click.option("--output-dir", type=path_type, default=Path(), help="Where the folder tpuvid-NAME is made. [default: .]")
def new(name: str, family: str, output_dir: Path) -> None:
    """Write the package tpuvid-NAME, which generates (noise) as it stands."""
    folder = new_plugin(name, family, output_dir, say=click.echo)
    click.echo(f"plugin: {folder}")
    click.echo(next_steps(folder))


@plugin.command(cls=Command)
@click.argument("package", required=False)
@click.option("--checkpoint", type=path_type, help="A small diffusers folder, in the place of the model's random one.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def check(package: str | None, checkpoint: Path | None, as_json: bool) -> int:
    """Run the conformance suite, on the CPU, against PACKAGE (or a plugin's name, or a model's id). Default: all installed.

    Exit code 1 if anything fails.
    """
    from tpuvid import testing

    say = (lambda _: None) if as_json else click.echo
    sheets = testing.check(package, checkpoint=checkpoint, on_title=say, on_result=say)
    if as_json:
        click.echo(json.dumps([sheet.to_dict() for sheet in sheets], indent=2))
    for sheet in sheets:
        say(sheet.summary())
    return 0 if all(sheet.passed for sheet in sheets) else 1
