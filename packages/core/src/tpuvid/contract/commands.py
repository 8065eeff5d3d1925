"""What a command of a package says about itself. Imports nothing heavy, nor the command."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandSpec:
    """A command that a package adds: ``tpuvid NAME``."""

    name: str
    """Lower-case letters, digits and hyphens."""
    load_command: str
    """ "module:attribute", a click command or group: imported when it is run, or asked for its own help. A number that it
    returns is the exit code."""
    help: str
    """A line, for ``tpuvid --help``."""
