"""Shared set-up: jaxtyping's shape annotations are checked wherever there are any, and no test touches the user's caches."""

import gc
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

ROOT = Path(__file__).parents[1]
gc.set_threshold(100_000)  # imports make a million objects, none of which is garbage

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads spin while they wait, as many a worker as there are cores
os.environ.setdefault("TPUVID_CACHE_DIR", str(ROOT / ".pytest_cache" / "tpuvid"))
# XLA's older code generator for CPUs compiles in a third of the time; children have it too
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 --xla_llvm_force_inline_before_split=false",
)

FAMILIES = [family for family in ("wan", "cogvideox", "hunyuan") if find_spec(f"tpuvid_{family}")]
"""Those installed: each package has an environment of its own (make test PACKAGE=wan)."""

CHECKED = [
    f"tpuvid.compute.{module}"
    for module in ("guidance", "inputs", "kernels", "moment", "noise", "sampler", "schedule", "t5", "tiles")
]
CHECKED += [f"tpuvid_{family}.{stage}" for family in FAMILIES for stage in ("encode", "denoise", "decode")]
install_import_hook(CHECKED, "beartype.beartype")

import jax  # noqa: E402  (after the hook and the environment)
from tpuvid.family import Weights  # noqa: E402

LONGEST = (
    "test_cogvideox_tiling", "test_generate", "test_packs", "test_cogvideox_mesh", "test_cogvideox_fidelity",
    "test_conformance", "test_hunyuan_mesh", "test_wan_mesh", "test_hunyuan_fidelity", "test_wan_fidelity", "test_torture",
    "test_plugin_new", "test_tutorial", "test_docs", "test_attention", "test_hunyuan_stages", "test_wan_stages",
    "test_cogvideox_stages",
)  # fmt: skip
"""Files that take a minute and more: they come first, so that no worker of pytest-xdist begins one when the others are done."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish():
    """Nothing that is imported is garbage: the collector, which frees each stage's weights, need not look at it again."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def compilers_effort(request):
    """Programs are compiled with the least effort, but for modules that run them for long, which are marked `optimized`."""
    least = request.node.get_closest_marker("optimized") is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(least)))  # of children
        before = jax.config.read("jax_disable_most_optimizations")
        jax.config.update("jax_disable_most_optimizations", least)
        yield
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def python_env() -> dict[str, str]:
    """The environment of a child process that must not see the tests' own settings."""
    own = ("TPUVID_", "XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    return {k: v for k, v in os.environ.items() if not k.startswith(own)}


@pytest.fixture
def tpuvid_command() -> str:
    return str(Path(sys.executable).with_name("tpuvid"))


@pytest.fixture
def forbid_weights(monkeypatch) -> Callable[[], None]:
    """Once called, reading any weight fails the test: what is refused must be refused before."""
    return lambda: monkeypatch.setattr(Weights, "read", lambda *_: pytest.fail("weights were read"))
