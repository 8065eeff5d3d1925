"""What the command says of a video that is written, and of how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from tpuvid.contract.values import History


def say_files(files: Mapping[str, Path], record: Mapping[str, Any], frames: int) -> None:
    for name, path in files.items():
        click.echo(f"{name}: {path}")
    if frames != (asked := record["num_frames"]):
        click.echo(f"frames: {frames}; {asked} were asked for, and this VAE makes {frames} of as many latents")


def say_how(history: History, *stages: str) -> None:
    """What the window showed, which steps the cache served, where the profile is, and what came out of the pack."""
    about = history.get("denoise", {}) if not stages or "denoise" in stages else {}
    if resumed := about.get("resumed"):
        click.echo(f"resumed: {resumed}")
    if window := about.get("window"):
        click.echo(f"window: a token sees {window}")
    if cache := about.get("cache"):
        click.echo(f"cache: {cache['name']}: full steps {cache['full']}; cached steps {cache['cached']}")
    if profile := about.get("profile"):
        click.echo(f"profile: {profile} (*.xplane.pb for XProf, perfetto_trace.json.gz for Perfetto)")
    for note in ("loaded from pack", "compiled beside the pack"):
        if programs := [history[stage][note] for stage in stages or history if note in history[stage]]:
            click.echo(f"{note}: {'; '.join(programs)}")
