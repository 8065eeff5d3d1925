"""Who may import whom: read from the source, so that no import path is missed."""

import ast
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[1] / "packages"
LIBRARIES = {
    "core": "tpuvid",
    "wan": "tpuvid_wan",
    "cogvideox": "tpuvid_cogvideox",
    "hunyuan": "tpuvid_hunyuan",
    "tiny": "tpuvid_tiny",
}
MAY_IMPORT = {"tiny": {"tpuvid_wan"}}
"""Model packages never import each other; wan-tiny is a Wan checkpoint."""
SOURCES = [(package, path) for package in LIBRARIES for path in sorted((PACKAGES / package / "src").rglob("*.py"))]


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Every module that a file imports, dotted; those under `if TYPE_CHECKING` don't count."""
    tree = ast.parse(path.read_text())
    skipped = {
        n
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for n in ast.walk(node)
    }
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def roots(modules: set[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


def test_every_package_is_looked_at():
    assert {package for package, _ in SOURCES} == set(LIBRARIES)
    assert {p.name for p in PACKAGES.iterdir() if (p / "pyproject.toml").exists()} == set(LIBRARIES)


@pytest.mark.parametrize("package, path", SOURCES, ids=lambda value: value if isinstance(value, str) else value.name)
def test_who_imports_whom(package, path):
    found = roots(imports(path))
    others = set(LIBRARIES.values()) - {"tpuvid", LIBRARIES[package]} - MAY_IMPORT.get(package, set())
    assert not found & others
    if package == "core":
        assert not found & {"diffusers", "transformers"}
        if path.name != "bridge.py":
            assert "torchax" not in found
    else:
        assert "torchax" not in found
    if path.parent.name == "kernels":
        others = {m for m in imports(path) if m.startswith("tpuvid") and not m.startswith("tpuvid.kernels")}
        assert not others and not found & {"torch", "diffusers"}


@pytest.mark.parametrize(
    "path",
    [
        p
        for _, p in SOURCES
        if p.name
        in {
            "hookspecs.py",
            "registry.py",
            "stages.py",
            "cli.py",
            "options.py",
            "errors.py",
            "plugin.py",
            "checkpoint.py",
            "artifacts.py",
            "compare.py",
            "describe.py",
            "packs.py",
            "run_key.py",
            "doctor.py",
            "topologies.py",
            "commands.py",
            "jobs.py",
            "planning.py",
            "report.py",
            "compiling.py",
            "tune.py",
            "hlo.py",
            "flops.py",
            "links.py",
            "bundles.py",
            "schedules.py",
            "cost.py",
        }
    ],
    ids=lambda p: p.name,
)
def test_light_modules_import_nothing_heavy(path):
    assert not roots(imports(path, top_level_only=True)) & {"jax", "torch", "torchax", "diffusers", "transformers"}


def test_no_module_changes_torch_or_jax_globally():
    for _, path in SOURCES:
        text = path.read_text()
        for change in ("set_default_dtype", "set_default_device", "enable_globally", "enable_x64"):
            assert change not in text, f"{path}: {change}"


@pytest.mark.parametrize("package", list(LIBRARIES))
def test_tests_of_a_package_need_no_other(package):
    """They run where nothing else of ours is installed (make test PACKAGE=…); what needs more stands in tests/together."""
    own = {LIBRARIES[package], "tpuvid"} | MAY_IMPORT.get(package, set())
    for path in sorted((PACKAGES.parent / "tests" / package).rglob("*.py")):
        assert not roots(imports(path)) & set(LIBRARIES.values()) - own, path.name
