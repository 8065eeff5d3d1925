"""What happens while videos are made, for whoever watches: a terminal, a server. Imports neither jax nor torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed:
    """A part of the work has begun, has got further or has ended."""

    what: str
    """The part's name, for people: "load denoiser", "compile denoiser", "denoise"."""
    done: int | None = None
    """The steps that are done; None: the part has no steps."""
    total: int | None = None
    """The steps of the part."""
    unit: str = "step"
    """What a step is called, in the singular."""
    seconds: float | None = None
    """What the part took, parts within it left out; None: it goes on."""
    failed: bool = False
    """Whether it has ended because of an error."""
    detail: bool = False
    """Whether it is for those alone who want to know more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """The next of several like parts begins."""

    what: str
    """What is done with each: "encoding", "denoising", "decoding"."""
    number: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Noticed:
    """Something that the user should know, in a sentence; the work goes on."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoMade:
    """A video stands there, with all its files."""

    files: Mapping[str, Path]
    """The files by what they are; "video" is the mp4."""
    seed: int
    frames: int
    record: Mapping[str, Any]
    """How it was made: see `tpuvid.runs.kept.record`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoFailed:
    """A video of several could not be made; the others go on."""

    video: Path
    prompt: str
    where: str
    """Where it was asked for, "prompts.csv, line 3"; "" where only one place asks."""
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """The run was stopped by its user."""

    done: int | None
    """The denoising steps that were done; None: it was not denoising."""
    total: int | None
    kept: bool
    """Whether the same request goes on where this run ended."""
    terminated: bool
    """Whether it was SIGTERM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What has become of a request."""

    made: int = 0
    there: int = 0
    """The videos that stood there already."""
    failed: int = 0
    videos: tuple[Path, ...] = ()
    """The mp4s that were asked for, whatever has become of each."""
    pages: Mapping[str, Path] = field(default_factory=dict)
    """What shows a sweep, by what it is."""
    stopped: Stopped | None = None
    """Set where the run did not come to its end; the counts are then of no use."""


Event = Progressed | Reached | Noticed | VideoMade | VideoFailed
Emit = Callable[[Event], None]
