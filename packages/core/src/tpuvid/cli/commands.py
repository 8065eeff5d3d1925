"""The commands of ``tpuvid``: those of `tpuvid.cli.main`, and those that packages register, imported when they are run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, MutableMapping
from typing import Any

import click

from tpuvid.cli.console import QUIET, VERBOSE, Console
from tpuvid.cli.words import meant
from tpuvid.contract.commands import CommandSpec
from tpuvid.contract.models import imported
from tpuvid.errors import TpuvidError
from tpuvid.plugin.checks import OWN_COMMANDS
from tpuvid.plugin.loader import said
from tpuvid.plugin.registry import registry


def _set_level(level: int) -> Callable[[click.Context, click.Parameter, bool], None]:
    def set_level(context: click.Context, _: click.Parameter, given: bool) -> None:
        console = context.find_root().obj
        if given and isinstance(console, Console):
            console.level = level

    return set_level


def _level_options() -> list[click.Option]:
    return [
        click.Option(["-v", "--verbose"], is_flag=True, expose_value=False, callback=_set_level(VERBOSE), help="Say more."),
        click.Option(["-q", "--quiet"], is_flag=True, expose_value=False, callback=_set_level(QUIET), help="Say results only."),
    ]


class Command(click.Command):
    """A command that takes -v and -q, and whose other flags are given once: of two values, nobody could say which is meant."""

    def __init__(self, *args: Any, **about: Any) -> None:
        super().__init__(*args, **about)
        self.params += _level_options()

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        if not context.resilient_parsing:  # as it is for the completion of a line that isn't whole
            try:
                _, _, order = self.make_parser(context).parse_args(args=list(args))
            except click.NoSuchOption as error:
                if hint := meant(error.option_name):
                    raise click.UsageError(f"No such option '{error.option_name}'. {hint}", context) from None
                raise
            for option, times in Counter(order).items():
                if times > 1 and isinstance(option, click.Option) and not option.multiple:
                    raise click.UsageError(f"Option '{option.opts[0]}' is given {times} times; give it once.", context)
        return super().parse_args(context, args)


class Commands(click.Group):
    """A registered command never stands in the way of one of `tpuvid.cli.main`, nor a broken one of any other."""

    command_class = Command

    def __init__(self, *args: Any, **about: Any) -> None:
        super().__init__(*args, **about)
        self.params += _level_options()

    @property
    def commands(self) -> MutableMapping[str, click.Command]:
        """tpuvid-core's commands, whichever way they come; those of other packages are imported by `get_command` alone."""
        registered = {name: _loaded(spec) for name, spec in registry().commands.items() if name in OWN_COMMANDS}
        return {**self._added, **registered}

    @commands.setter
    def commands(self, added: MutableMapping[str, click.Command]) -> None:
        self._added = added

    def add_command(self, command: click.Command, name: str | None = None) -> None:
        name = name or command.name
        assert name is not None, "a command has a name"
        self._added[name] = command

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted({*self._added, *registry().commands})

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name in self._added:
            return self._added[name]
        spec = registry().command(name)
        return None if spec is None else _loaded(spec)

    def resolve_command(self, context: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(context, args)
        except click.UsageError as error:
            raise click.UsageError(error.format_message() + registry().hint, context) from None

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands as click does, without importing what is registered."""
        lines = {spec.name: spec.help for spec in registry().commands.values()}
        width = formatter.width - 6 - max(map(len, [*lines, *self._added]))
        lines |= {name: command.get_short_help_str(width) for name, command in self._added.items()}
        with formatter.section("Commands"):
            formatter.write_dl(sorted(lines.items()))


def _loaded(spec: CommandSpec) -> click.Command:
    """Raises `TpuvidError` for whatever goes wrong with it."""
    try:
        command = imported(spec.load_command)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also an exit, which would look like success
        raise TpuvidError(f"{spec.name}: {spec.load_command} can't be imported ({said(error)}); mend its package") from error
    if not isinstance(command, click.Command):
        raise TpuvidError(f"{spec.name}: {spec.load_command} is a {type(command).__name__}, no click command; mend its package")
    return command
