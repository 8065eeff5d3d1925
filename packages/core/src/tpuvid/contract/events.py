"""What happens while videos are made, for whoever watches: a terminal, a server. Imports neither jax nor torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed:
    """A part of the work has begun, has got further or has ended."""

    what: str
    """The part's name, for people: "load denoiser", "compile denoiser", "denoise"."""
    done: int | None = None
    """The steps that are done; None: the part has no steps."""
    total: int | None = None
    """The steps of the part."""
    seconds: float | None = None
    """What the part took, parts within it left out; None: it goes on."""
    failed: bool = False
    """Whether it has ended because of an error."""


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


Event = Progressed | Reached | Noticed
Emit = Callable[[Event], None]
