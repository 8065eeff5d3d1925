"""A new plugin: a package from templates, and its tiny random checkpoint."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from tpuvid.contract.models import API_VERSION
from tpuvid.errors import InputError, TpuvidError
from tpuvid.files.atomic import check_output
from tpuvid.files.scratch import scratch_folder
from tpuvid.plugin.registry import registry

TEMPLATES = Path(__file__).with_name("templates")
SUFFIX = ".tmpl"
FAMILIES = {"blank": (), "wan-like": ("tpuvid-wan",), "cogvideox-like": ("tpuvid-cogvideox",)}
"""The packages of ours whose stages the template changes."""
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
LONGEST = 40


def new_plugin(name: str, family: str, parent: Path, *, say: Callable[[str], None] = lambda line: None) -> Path:
    """Write the package ``tpuvid-NAME`` into a folder of that name in `parent`, with a random checkpoint; returns the folder.

    It appears whole or not at all. Raises `InputError` for a name that can't be, or is taken, and where the package whose
    stages it would change is missing.
    """
    if not (isinstance(name, str) and NAME.fullmatch(name) and len(name) <= LONGEST):
        near = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-0123456789")[:LONGEST]
        hint = f"; for example {near}" if NAME.fullmatch(near) else ""
        raise InputError(f"name={name[:80]!r}: needs lower-case letters, digits and single '-', and a letter first{hint}")
    known = registry()
    if name in known.models or any(name in (p.name, p.package.removeprefix("tpuvid-")) for p in known.plugins):
        raise InputError(f"name={name!r}: an installed plugin or model has it; choose another")
    for package in FAMILIES[family]:
        if not any(p.package == package and not p.error for p in known.plugins):
            raise InputError(
                f"family={family!r}: changes the stages of {package}, which is not installed; pip install {package}"
            )
    folder = parent / f"tpuvid-{name}"
    if folder.exists():
        raise InputError(f"{folder}: exists; choose another name, or --output-dir")
    check_output(folder, overwrite=True)
    with _existing(parent), scratch_folder(parent) as scratch:
        written = scratch / folder.name
        for path, text in _files(name, family):
            target = written / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, "utf-8")
        say("making a random checkpoint")
        _make_checkpoint(written / "src", _module(name))
        written.rename(folder)
    return folder


@contextmanager
def _existing(folder: Path) -> Iterator[None]:
    """Within it `folder` exists; what was made for that goes again where it fails."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in made:
            path.rmdir()
        raise


def next_steps(folder: Path) -> str:
    name = folder.name.removeprefix("tpuvid-")
    return (
        f"next:\n  pip install -e {folder}\n  tpuvid list-models\n"
        f'  tpuvid generate --model {name} --prompt "a cat"\n  tpuvid plugin check {folder.name}'
    )


def _module(name: str) -> str:
    return f"tpuvid_{name.replace('-', '_')}"


def _files(name: str, family: str) -> Iterator[tuple[str, str]]:
    """(path in the package, text) of every template, with the names filled in."""
    words = {
        "name": name,
        "module": _module(name),
        "Class": "".join(word.capitalize() for word in name.split("-")),
        "family": family,
        "compatible": _compatible("tpuvid-core"),
        **{f"compatible with {package}": _compatible(package) for package in FAMILIES[family]},
        "api": str(API_VERSION),
    }
    for folder in (TEMPLATES / "common", TEMPLATES / family):
        for source in sorted(folder.rglob(f"*{SUFFIX}")):
            path = str(source.relative_to(folder)).removesuffix(SUFFIX)
            text = source.read_text("utf-8")
            for word, value in words.items():
                path, text = path.replace(f"@{word}@", value), text.replace(f"@{word}@", value)
            yield path, text


def _compatible(package: str) -> str:
    """The versions of `package` that a plugin made today may be used with: all before the next minor one, which may change
    interfaces."""
    found = version(package)
    major, minor, *_ = found.split(".")
    return f">={found},<{major}.{int(minor) + 1}"


def _make_checkpoint(source: Path, module: str) -> None:
    """Make the checkpoint with the package's own maker, in a process of its own: it imports torch and diffusers."""
    path = os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH")]))
    folder = source / module / "checkpoint"
    command = [sys.executable, "-W", "ignore", "-m", f"{module}.conformance", str(folder)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise TpuvidError(
            f"the random checkpoint can't be made here: {said}; pip install diffusers transformers, and try again"
        )
