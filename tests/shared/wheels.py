"""Packages as a user gets them: built to wheels, installed into an empty environment outside the workspace."""

import os
import shutil
import site
import subprocess
import sys
from pathlib import Path


def uv(*arguments, **options) -> str:
    program = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build_wheel(package: Path, scratch: Path, out: Path) -> Path:
    """Of a copy, so that nothing but what git would ship can be picked up from around it."""
    copy = scratch / package.name
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__", "dist"))
    before = set(out.glob("*.whl"))
    uv("build", "--quiet", "--wheel", "--no-build-isolation", "--python", sys.executable, "--out-dir", out, copy, cwd=copy)
    (wheel,) = set(out.glob("*.whl")) - before
    return wheel


def install(wheels: list[Path], folder: Path) -> Path:
    """Into a new environment in `folder`, whose scripts' folder is returned. Dependencies are those of this environment, at
    their versions; the workspace is not in sight."""
    python = folder / "venv" / "bin" / "python"
    uv("venv", "--quiet", "--python", sys.executable, folder / "venv", cwd=folder)
    pins = [line for line in uv("pip", "freeze", "--python", sys.executable).splitlines() if "==" in line]
    (folder / "pins.txt").write_text("\n".join(p for p in pins if not p.startswith("tpuvid")))
    links = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS")
    find = ["--find-links", links] if links else []
    uv("pip", "install", "--quiet", "--python", python, *find, "--constraint", folder / "pins.txt", *wheels, cwd=folder)
    return python.parent


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
        return self.run("-c", "from tpuvid.cli.main import main; main()", *arguments, code=code)
