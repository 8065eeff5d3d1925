"""What a page of the documentation asks its reader to type, and whether that can be typed.

A fenced block's language says what it is; its title, which the site shows above it, what it needs or where it belongs:

    ```sh                                        commands that end with exit code 0, run one after the other
    ```sh title="exit code 2"                    commands that end with this one
    ```sh title="needs libtpu"                   run where libtpu is installed (make test-aot)
    ```sh title="needs libtpu, many minutes"     not run
    ```sh title="needs a TPU"                    not run, of which weights of the Hub are a part
    ```python                                    run after the page's blocks before it, in one namespace
    ```text title="prints"                       lines that the block before printed
    ```csv title="prompts.csv"                   a file that the blocks after it find; of any language but sh
    ```text                                      shown, nothing more; so are csv, json, toml and yaml, which must be such

There are no other fences, and no commands in indented blocks. Whether a block is run or not, its commands are looked at
(`check_command`): a flag that no longer exists, a model that isn't registered or a size that it can't have is found in each.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import yaml
from tpuvid.cli.main import cli
from tpuvid.contract.settings import SETTINGS
from tpuvid.errors import TpuvidError
from tpuvid.plan.topologies import LOCAL, parse_topology
from tpuvid.plugin.registry import registry

ROOT = Path(__file__).parents[2]
NEEDS_TPU, NEEDS_LIBTPU, NEEDS_LONG = "needs a TPU", "needs libtpu", "needs libtpu, many minutes"
EXIT_CODE = re.compile(r"exit code (\d+)")
FILE_NAME = re.compile(r"(?:[\w-]+/)*[\w-]+\.\w+")
LANGUAGES = ("sh", "python", "text", "toml", "yaml", "json", "csv")
FENCE = re.compile(r" *(`{3,})\s*([\w-]*)\s*(.*)")
PROGRAMS = ("tpuvid", "make", "pip", "python", "uv", "cd", "scripts/setup.sh")
TYPED = re.compile(rf"( {{4,}}|\t)\$? ?({'|'.join(map(re.escape, PROGRAMS))}) \S")


class Wrong(AssertionError):
    """A page says what can't be done."""


@dataclass(frozen=True)
class Block:
    page: str
    """From the repository's root."""
    line: int
    language: str
    title: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def exit_code(self) -> int:
        found = EXIT_CODE.fullmatch(self.title)
        return int(found[1]) if found else 0

    @property
    def is_file(self) -> bool:
        return bool(FILE_NAME.fullmatch(self.title))

    def commands(self) -> list[list[str]]:
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line.removeprefix("$ "), comments=True))]


def pages() -> list[str]:
    return ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


def blocks(page: str, text: str | None = None) -> list[Block]:
    """The fenced blocks of a page, in order; raises `Wrong` for a command in an indented one."""
    text = (ROOT / page).read_text("utf-8") if text is None else text
    found, fence, start = [], None, 0
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        match = FENCE.fullmatch(line)
        if fence is None and match:
            fence, start = match, number
        elif fence is not None and line.strip() == fence[1]:
            title = re.fullmatch(r'title="([^"]*)"', fence[3])
            if fence[3] and not title:
                raise Wrong(f"{page}:{start}: after the language comes title=…, not {fence[3]!r}")
            found.append(Block(page, start, fence[2], title[1] if title else "", "\n".join(lines[start : number - 1])))
            fence = None
        elif fence is None and TYPED.match(line):
            raise Wrong(f"{page}:{number}: a command in an indented block; fence it with ```sh")
    if fence is not None:
        raise Wrong(f"{page}:{start}: a fence without an end")
    return found


def check_block(block: Block) -> None:
    """Raise `Wrong` for a block that is neither run, nor marked, nor no command; and for commands that can't be."""
    titles = {"sh": (NEEDS_TPU, NEEDS_LIBTPU, NEEDS_LONG), "python": (NEEDS_TPU,), "text": ("prints",)}
    if block.language not in LANGUAGES:
        raise Wrong(f"{block.where}: a fence of {block.language or 'no language'}; tests/docs/blocks.py says which there are")
    shown = block.language != "sh" and block.is_file
    known = block.title in ("", *titles.get(block.language, ()))
    ends = block.language == "sh" and EXIT_CODE.fullmatch(block.title)
    if not (known or shown or ends):
        raise Wrong(f"{block.where}: title={block.title!r} is none of those in tests/docs/blocks.py")
    try:
        if block.language == "toml":
            tomllib.loads(block.text)
        if block.language in ("yaml", "json"):
            yaml.safe_load(block.text)
        if block.language == "python":
            compile(block.text, block.where, "exec")
    except (ValueError, SyntaxError, yaml.YAMLError) as error:
        raise Wrong(f"{block.where}: is no {block.language} ({error})") from None


def check_command(words: list[str], where: str, *, refused: bool = False, registered: bool = True) -> None:
    """Raise `Wrong` for a command that can't be typed. `refused`: its settings should be; `registered`: its model is known."""
    program, *arguments = words
    match Path(program).name:
        case "tpuvid":
            _check_tpuvid(arguments, where, refused=refused, registered=registered)
        case "make":
            for target in arguments:
                if target not in make_targets() and "=" not in target:
                    raise Wrong(f"{where}: make {target}: the Makefile has no such target")
        case "pip":
            _check_pip(arguments, where)
        case "python" if arguments and arguments[0].endswith(".py"):
            _check_file(arguments[0], where)
        case "setup.sh":
            _check_file(program, where)
        case _:
            raise Wrong(f"{where}: no test knows how to check {shlex.join(words)!r}")


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))


def flags() -> set[str]:
    """The flags of all commands of tpuvid."""
    return {name for _, command in commands() for p in command.params for name in p.opts} | {"--help", "--version"}


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


def _check_tpuvid(arguments: list[str], where: str, *, refused: bool, registered: bool) -> None:
    asked: list[dict[str, Any]] = []
    try:
        with patch.object(click.Command, "invoke", lambda self, context: asked.append(context.params)):
            cli.main(arguments, prog_name="tpuvid", standalone_mode=False)
        settings = asked[-1] if asked else {}
        if settings.get("topology") not in (None, *LOCAL):  # whether libtpu is installed or not
            parse_topology(settings["topology"])
        if registered and (model := settings.get("model")) and not refused:
            asked_for = {name: value for name, value in settings.items() if name in SETTINGS and value is not None}
            registry().get(model).configure(**asked_for)
    except (click.ClickException, TpuvidError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else error
        raise Wrong(f"{where}: tpuvid {shlex.join(arguments)}: {message}") from None


def _check_pip(arguments: list[str], where: str) -> None:
    if arguments[0] != "install":
        raise Wrong(f"{where}: pip {shlex.join(arguments)}: no test knows how to check it")
    for asked in arguments[1:]:
        name, _, extra = asked.rstrip("]").partition("[")
        project = ROOT / "packages" / name.removeprefix("tpuvid-") / "pyproject.toml"
        about = tomllib.loads(project.read_text())["project"] if project.is_file() else {}
        if about.get("name") != name or (extra and extra not in about.get("optional-dependencies", {})):
            raise Wrong(f"{where}: pip install {asked}: is no distribution of this workspace")


def _check_file(name: str, where: str) -> None:
    if not (ROOT / name).is_file():
        raise Wrong(f"{where}: {name} is not in the repository")
