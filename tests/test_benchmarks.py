"""Benchmarks that need what a machine may not have run here as far as they can."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

GPU_STEP = Path(__file__).parents[1] / "benchmarks" / "gpu_step.py"


def run(*arguments: str) -> str:
    return subprocess.run([sys.executable, str(GPU_STEP), *arguments], capture_output=True, text=True, check=True).stdout


def test_a_gpu_step_is_measured_against_diffusers():
    *_, head, _, row = run("--platform", "cpu", "--models", "wan-tiny", "--steps", "3").splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert head.startswith("| model |") and cells[0] == "`wan-tiny`"
    ours, theirs = map(float, cells[1:3])
    assert ours > 0 and float(cells[3].rstrip("×")) == pytest.approx(theirs / ours, rel=0.1)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is one")
def test_without_a_gpu_it_says_so():
    assert "nothing was measured: JAX sees no gpu and this torch sees no GPU" in run("--models", "wan2.1-t2v-1.3b")
