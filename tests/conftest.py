"""Shared set-up: jaxtyping's shape annotations are checked wherever there are any, and no test touches the user's caches."""

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

ROOT = Path(__file__).parents[1]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPUVID_CACHE_DIR", str(ROOT / ".pytest_cache" / "tpuvid"))

FAMILIES = [family for family in ("wan", "cogvideox", "hunyuan") if find_spec(f"tpuvid_{family}")]
"""Those installed: each package has an environment of its own (make test PACKAGE=wan)."""

CHECKED = [f"tpuvid.{module}" for module in ("kernels", "sampling", "schedule", "denoising", "t5", "tiling")]
CHECKED += [f"tpuvid_{family}.{stage}" for family in FAMILIES for stage in ("encode", "denoise", "decode")]
install_import_hook(CHECKED, "beartype.beartype")

from tpuvid.checkpoint import Weights  # noqa: E402  (after the hook)


@pytest.fixture(scope="session")
def python_env() -> dict[str, str]:
    """The environment of a child process that must not see the tests' own settings."""
    return {k: v for k, v in os.environ.items() if not k.startswith("TPUVID_")}


@pytest.fixture
def tpuvid_command() -> str:
    return str(Path(sys.executable).with_name("tpuvid"))


@pytest.fixture
def forbid_weights(monkeypatch) -> Callable[[], None]:
    """Once called, reading any weight fails the test: what is refused must be refused before."""
    return lambda: monkeypatch.setattr(Weights, "read", lambda *_: pytest.fail("weights were read"))
