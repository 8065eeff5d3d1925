"""``tpuvid generate``: what happens to a request, as people read it, and the exit code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from tpuvid.cli.console import Console
from tpuvid.cli.messages import say_files, say_how
from tpuvid.cli.signals import exit_code, stoppable
from tpuvid.contract.events import Event, Outcome, Stopped, VideoFailed, VideoMade
from tpuvid.runs.asked.requests import Generation
from tpuvid.runs.execution import Execution

if TYPE_CHECKING:
    from tpuvid.runs.pipeline import Pipeline

EXIT_SOME_FAILED = 3


def carry_out(request: Generation, load: Callable[[], Pipeline], console: Console) -> int:
    """Make the videos of `request`, and say what becomes of them; `console` shows the rest. Returns the exit code."""
    teller = Teller(request, console)
    with stoppable() as cancel:
        outcome = Execution(request=request, load=load, emit=teller, cancel=cancel).run()
    if outcome.stopped:
        return teller.stopped(outcome.stopped)
    return teller.ended(outcome)


@dataclass(frozen=True)
class Teller:
    """Says what happens to a request."""

    request: Generation
    console: Console

    def __call__(self, event: Event) -> None:
        match event:
            case VideoMade() if self.request.many:
                click.echo(f"video: {event.files['video']} (seed {event.seed})")
            case VideoMade():
                say_files(event.files, event.record, event.frames)
                click.echo(f"seed: {event.seed}")
                say_how(event.record["history"])
            case VideoFailed():
                where = f"{event.where}: " if event.where else ""
                click.echo(f"tpuvid: error: {where}{event.prompt!r}: {event.error}", err=True)
            case _:
                self.console(event)

    def stopped(self, at: Stopped) -> int:
        where = "interrupted" if at.done is None else f"stopped after step {at.done} of {at.total}"
        click.echo(f"tpuvid: {where}; {self.request.how_to_go_on if at.kept else 'nothing is kept'}", err=True)
        return exit_code(at.terminated)

    def ended(self, outcome: Outcome) -> int:
        if not self.request.many:
            if outcome.there:
                click.echo(f"video: {outcome.videos[0]} (there already)")
            return 0
        for name, path in outcome.pages.items():
            click.echo(f"{name}: {path}")
        counts = f"{outcome.made} made, {outcome.there} there already, {outcome.failed} failed"
        click.echo(f"videos: {counts}; in {self.request.folder}")
        if outcome.failed:
            click.echo("the same command tries again what failed, and only that", err=True)
        return EXIT_SOME_FAILED if outcome.failed else 0
