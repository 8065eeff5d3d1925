"""Packages as a user gets them: built to wheels, installed into an empty environment outside the workspace."""

import email
import importlib.metadata
import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

from shared import processes


def uv(*arguments, **options) -> str:
    program = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build_wheel(package: Path, scratch: Path, out: Path) -> Path:
    """Build from a copy, so that nothing but what git would ship can be picked up from around it."""
    copy = scratch / package.name
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__", "dist"))
    before = set(out.glob("*.whl"))
    uv("build", "--quiet", "--wheel", "--no-build-isolation", "--python", sys.executable, "--out-dir", out, copy, cwd=copy)
    (wheel,) = set(out.glob("*.whl")) - before
    return wheel


def install(wheels: list[Path], folder: Path) -> Path:
    """Into a new environment in `folder`, whose scripts' folder is returned. Of this environment's packages it has those that
    the wheels say they need, and what these need, by links: nothing is fetched or
    compiled to bytecode, and the workspace is not in sight."""
    python = folder / "venv" / "bin" / "python"
    uv("venv", "--quiet", "--python", sys.executable, folder / "venv", cwd=folder)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    for source in _needed(wheels):
        if source.suffix == ".dist-info":  # which uv doesn't see through a link
            shutil.copytree(source, packages / source.name)
        elif not (packages / source.name).exists():
            (packages / source.name).symlink_to(source)
    uv("pip", "install", "--quiet", "--offline", "--no-index", "--python", python, *wheels, cwd=folder)
    return python.parent


def _needed(wheels: list[Path]) -> set[Path]:
    """Files and folders in the site-packages of this environment that the wheels' dependencies have brought."""
    own = {wheel.name.split("-")[0].replace("_", "-") for wheel in wheels}
    asked = [Requirement(line) for wheel in wheels for line in _required_by(wheel)]
    seen: set[tuple[str, str]] = set()
    found: set[Path] = set()
    while asked:
        requirement = asked.pop()
        name = requirement.name.replace("_", "-").lower()
        if name in own:
            continue
        distribution = importlib.metadata.distribution(name)
        root = Path(str(distribution.locate_file("")))
        found |= {root / file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
        for extra in {"", *requirement.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            needs = map(Requirement, distribution.requires or ())
            asked += [r for r in needs if r.marker is None or r.marker.evaluate({"extra": extra})]
    return found


def _required_by(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist", [])
    return [line for line in lines if "extra ==" not in line]


def outside() -> dict[str, str]:
    """The environment of a process that must not find the workspace."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}


class Installed:
    """A package in an environment of its own, which sees everything of this one."""

    def __init__(self, folder: Path):
        self.folder = folder
        uv("venv", "--quiet", "--python", sys.executable, folder / "venv", cwd=folder)
        self.python = folder / "venv" / "bin" / "python"
        (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
        parents = [path for path in site.getsitepackages() if Path(path).is_dir()]
        self._command = (
            f"import site, sys; sys.executable = {str(self.python)!r}; site.addsitedir({str(packages)!r})\n{processes.COMMAND}"
        )
        (packages / "parent.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in parents))

    def install(self, package: Path) -> None:
        uv(
            "pip",
            "install",
            "--quiet",
            "--python",
            self.python,
            "--no-deps",
            "--no-build-isolation",
            "-e",
            package,
            cwd=self.folder,
        )

    def run(self, *arguments, code: int = 0, **variables) -> str:
        """Python with `arguments` must end with exit code `code`; what it printed."""
        command = [str(self.python), "-W", "ignore", *map(str, arguments)]
        done = subprocess.run(command, env=outside() | variables, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def tpuvid(self, *arguments, code: int = 0) -> str:
        """The command, of a warmed process that then is as if this environment's interpreter had started it."""
        done = processes.tpuvid(*map(str, arguments), env=outside(), cwd=self.folder, code=self._command)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout
