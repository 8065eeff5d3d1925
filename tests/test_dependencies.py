"""Who may import whom: read from the source, so that no import path is missed."""

import ast
from collections.abc import Iterator
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
    """Every module that a file imports, dotted, whatever the way; those under `if TYPE_CHECKING` don't count.

    `top_level_only`: what is imported with the file, in classes, `if` and `try` too.
    """
    found = set()
    for node in _running(ast.parse(path.read_text()), top_level_only):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, [_package(path, node.level), node.module])) if node.level else node.module or ""
            named = {f"{module}.{alias.name}" for alias in node.names} & OURS
            found |= named if len(named) == len(node.names) else named | {module}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "__import__",
            "import_module",
            "importlib.import_module",
        ):
            found |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return found


def _running(node: ast.AST, top_level_only: bool) -> Iterator[ast.AST]:
    """The nodes below `node` whose code runs, functions' too or not."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if top_level_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from _running(child, top_level_only)


def _dotted(path: Path) -> str:
    parts = path.parts[path.parts.index("src") + 1 :] if "src" in path.parts else path.parts[-1:]
    return ".".join(parts).removesuffix(".py").removesuffix(".__init__")


def _package(path: Path, level: int) -> str:
    """What "." (or "..", …) means in a file."""
    names = _dotted(path).split(".") + (["__init__"] if path.name == "__init__.py" else [])
    return ".".join(names[:-level])


OURS = {_dotted(path) for _, path in SOURCES} | {_dotted(path.parent / "__init__.py") for _, path in SOURCES}


def name_of(path: Path) -> str:
    """The module in a file of core."""
    return ".".join(("tpuvid", *path.relative_to(CORE).with_suffix("").parts)).removesuffix(".__init__")


def roots(modules: set[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


def test_no_way_of_importing_is_missed(tmp_path):
    source = """
from ..runs import control
from .. import cli
from tpuvid import compute
import tpuvid.plan.jobs as jobs
if TYPE_CHECKING:
    import diffusers
try:
    import jax
except ImportError:
    pass
class A:
    import torch
def late():
    import transformers
__import__("tpuvid.plan")
"""
    (tmp_path / "src" / "tpuvid" / "files").mkdir(parents=True)
    (path := tmp_path / "src" / "tpuvid" / "files" / "sources.py").write_text(source)
    early = {"tpuvid.runs.control", "tpuvid.cli", "tpuvid.compute", "tpuvid.plan.jobs", "jax", "torch", "tpuvid.plan"}
    assert imports(path, top_level_only=True) == early and imports(path) == early | {"transformers"}


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
        others = {m for m in imports(path) if m.startswith("tpuvid") and not m.startswith("tpuvid.compute.kernels")}
        assert not others and not found & {"torch", "diffusers"}


CORE = PACKAGES / "core" / "src" / "tpuvid"
ORDER = [
    "errors",
    "contract",
    "files",
    "plugin",
    "compute",
    ("runs", "plan", "family"),
    "__init__",
    "testing",
    "cli",
    "__main__",
]
"""Core's folders and top modules: each imports from earlier ones only, those of one place not from each other."""
RANKS = {name: rank for rank, names in enumerate(ORDER) for name in ([names] if isinstance(names, str) else names)}
HEAVY = {"jax", "jaxlib", "torch", "torchax", "diffusers", "transformers"}
MODULES = {name_of(path): path for path in sorted(CORE.rglob("*.py"))}


def room(module: str) -> str:
    """The folder of core that a module is in, or its own name where it stands at the top."""
    return module.split(".")[1] if "." in module else "__init__"


def inner(path: Path, *, top_level_only: bool = False) -> set[str]:
    """The modules of core that a file imports."""
    return {name for name in imports(path, top_level_only=top_level_only) if name in MODULES}


def test_core_has_no_other_rooms():
    found = {path.stem for path in CORE.iterdir() if path.suffix == ".py" or any(path.glob("**/*.py"))}
    assert found == set(RANKS)


@pytest.mark.parametrize("module", MODULES)
def test_no_import_goes_up(module):
    """Those inside functions included; only what is under `TYPE_CHECKING` may look up."""
    for other in inner(MODULES[module]):
        if room(other) != room(module):
            assert RANKS[room(other)] < RANKS[room(module)], f"{module} imports {other}"


def test_no_imports_go_in_a_circle():
    graph = {module: inner(path) - {module} for module, path in MODULES.items()}
    while ready := {module for module, others in graph.items() if not others & graph.keys()}:
        graph = {module: others for module, others in graph.items() if module not in ready}
    assert not graph, f"in a circle, or importing one: {sorted(graph)}"


@pytest.mark.parametrize(
    "module", [m for m in MODULES if room(m) in {"__init__", "errors", "contract", "files", "plugin", "cli"}]
)
def test_light_rooms_import_nothing_heavy(module):
    """At module level, themselves or by what they import."""
    seen, waiting = set(), [module]
    while waiting:
        seen.add(name := waiting.pop())
        path = MODULES[name]
        assert not roots(imports(path, top_level_only=True)) & HEAVY, f"{module} imports {name}"
        waiting += inner(path, top_level_only=True) - seen


@pytest.mark.parametrize("path", [p for _, p in SOURCES if p.name == "plugin.py" and CORE not in p.parents], ids=str)
def test_plugins_import_nothing_heavy(path):
    found = imports(path, top_level_only=True)
    assert not roots(found) & HEAVY and not {m for m in found if m.startswith("tpuvid.")} - {"tpuvid.contract", "tpuvid.errors"}


def test_model_packages_use_the_two_faces():
    faces = {"tpuvid", "tpuvid.contract", "tpuvid.errors", "tpuvid.family", "tpuvid.testing"}
    for package, path in SOURCES:
        if package != "core":
            found = {m for m in imports(path) if m.split(".")[0] == "tpuvid"} - {"tpuvid.testing.spread"}  # its function too
            assert not found - faces, path


def said_by(path: Path) -> list[str]:
    """The calls in a file that print or end the process."""
    names = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
    return sorted(names & {"print", "click.echo", "click.secho", "sys.exit", "os._exit", "exit", "quit", "SystemExit"})


def test_only_the_command_prints_and_exits():
    """The process of a job is one of its own: it ends as it has to."""
    found = {module: said for module, path in MODULES.items() if room(module) != "cli" and (said := said_by(path))}
    assert found == {"tpuvid.plan.jobs": ["os._exit"]}


def test_docstrings_stand_alone():
    """One that begins with "Of" answers a question that its reader can't see."""
    for _, path in SOURCES:
        assert '"""Of ' not in path.read_text(), path


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
