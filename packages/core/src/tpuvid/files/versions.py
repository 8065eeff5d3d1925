"""Versions of what is installed, and which diffusers it is. Imports nothing that it speaks of."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

LIBRARIES = ("jax", "jaxlib", "libtpu", "torch", "torchax", "diffusers", "transformers")
"""The libraries that compute."""
FORK = "diffusers-tpu"


def installed_version(package: str) -> str | None:
    """The version of a distribution; a fork under the name ``{package}-tpu`` answers where there is none of this name."""
    return distribution_version(package) or distribution_version(f"{package}-tpu")


def distribution_version(name: str) -> str | None:
    """The version of the distribution of exactly this name."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def diffusers_kind() -> str:
    """Which distribution answers to ``import diffusers``, for people: stock, or the fork diffusers-tpu."""
    stock, fork = distribution_version("diffusers"), distribution_version(FORK)
    if stock and not fork and _has_modules_of_the_fork():
        fork = stock
    return f"fork {FORK} {fork}" if fork else f"stock {stock}" if stock else "not installed"


def _has_modules_of_the_fork() -> bool:
    """The fork calls itself diffusers and has a version of stock's; its own modules beside the stock ones end in _torchax."""
    spec = find_spec("diffusers")
    folders = spec.submodule_search_locations if spec else None
    return any(any(Path(folder, "models", "transformers").glob("*_torchax.py")) for folder in folders or ())


def versions(*packages: str | None) -> dict[str, str]:
    """The versions of Python and of what computes, as far as it is installed; and of `packages`."""
    found = {"python": platform.python_version()}
    for name in ("tpuvid-core", *LIBRARIES, *filter(None, packages)):
        if (installed := installed_version(name)) is not None:
            found[name] = installed
    return found
