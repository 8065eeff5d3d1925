"""A plugin from outside: LTX-Video in tests/external, no workspace member, installed as wheels beside tpuvid-core alone."""

import json
import subprocess
from pathlib import Path

import pytest
from shared.wheels import build_wheel, install, outside

ROOT = Path(__file__).parents[1]
LTX = ROOT / "tests" / "external" / "tpuvid-ltx"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """(folder, runs a command in it)"""
    folder = tmp_path_factory.mktemp("outside")
    (out := folder / "wheels").mkdir()
    wheels = [build_wheel(package, tmp_path_factory.mktemp("source"), out) for package in (ROOT / "packages" / "core", LTX)]
    scripts = install(wheels, folder)

    def run(program, *arguments):
        return subprocess.run(
            [str(scripts / program), *map(str, arguments)], env=outside(), cwd=folder, capture_output=True, text=True
        )

    return folder, run


def test_it_is_small_and_stands_alone():
    sources = sorted((LTX / "src").rglob("*.py"))
    assert sum(len(path.read_text().splitlines()) for path in sources) < 300
    assert all(len(line) <= 128 for path in sources for line in path.read_text().splitlines())
    assert not any(
        name in path.read_text() for path in sources for name in ("tpuvid_wan", "tpuvid_cogvideox", "tpuvid_hunyuan", "torchax")
    )
    assert "ltx" not in (ROOT / "pyproject.toml").read_text()


def test_it_is_listed(environment):
    _, run = environment
    listed = run("tpuvid", "list-models", "--json")
    assert listed.returncode == 0 and listed.stderr == ""
    assert [row["model"] for row in json.loads(listed.stdout)["models"]] == ["ltx-video-0.9"]


def test_it_generates_and_denoises_for_its_frame_rate(environment):
    """LTX-Video's positions are in seconds: latents of another rate are other latents, and no decode may say otherwise."""
    folder, run = environment
    made = run(
        "python", "-c", "from pathlib import Path; from tpuvid_ltx.conformance import random_checkpoint as r; r(Path('random'))"
    )
    assert made.returncode == 0, made.stderr
    small = ["--height", 64, "--width", 64, "--num-frames", 9, "--steps", 2]
    done = run(
        "tpuvid", "generate", "--model", "random", "--prompt", "a cat", *small, "--sweep", "fps=8,25", "--output-dir", "clips"
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in sorted((folder / "clips").glob("*fps*.json"))]
    assert len(records) == 2 and len({record["latents_sha256"] for record in records}) == 2
    assert run("tpuvid", "encode", "--model", "random", "--prompt", "a cat").returncode == 0
    assert run("tpuvid", "denoise", *small, "--fps", 8).returncode == 0
    refused = run("tpuvid", "decode", "--fps", 25)
    assert refused.returncode == 2 and "denoised these latents for 8" in refused.stderr
    assert run("tpuvid", "decode").returncode == 0


def test_it_conforms(environment):
    _, run = environment
    done = run("tpuvid", "plugin", "check", "tpuvid-ltx")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ltx-video-0.9 (tpuvid-ltx 0.1.0): conforms" in done.stdout and "FAIL" not in done.stdout
    assert all(f"pass  {check}" in done.stdout for check in ("parity", "mesh", "bad input", "staged", "window"))
