"""Each package as a user gets it: built to a wheel, installed into an empty environment outside the workspace."""

import shutil
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
import tpuvid
from packaging.requirements import Requirement
from shared.wheels import build_wheel, install, outside, uv

ROOT = Path(__file__).parents[1]
ORDER = {
    "core": ["core"],
    "wan": ["core", "wan"],
    "cogvideox": ["core", "cogvideox"],
    "hunyuan": ["core", "hunyuan"],
    "tiny": ["core", "wan", "tiny"],
}
WAN = ["wan2.1-t2v-14b", "wan2.1-t2v-1.3b"]
HUNYUAN = ["hunyuanvideo-1.5-t2v-720p", "hunyuanvideo-1.5-t2v-480p"]
MODELS = {"core": [], "wan": WAN, "cogvideox": ["cogvideox1.5-5b"], "hunyuan": HUNYUAN, "tiny": [*WAN, "wan-tiny"]}


@pytest.fixture(scope="session")
def wheels(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheels")
    return {package: build_wheel(ROOT / "packages" / package, tmp_path_factory.mktemp("source"), out) for package in ORDER}


@pytest.mark.parametrize(
    "package", ["core", "tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in ("wan", "cogvideox", "hunyuan"))]
)
def test_wheel_works_alone(package, wheels, tmp_path):
    env = outside()
    command = [str(install([wheels[p] for p in ORDER[package]], tmp_path) / "tpuvid")]
    listed = subprocess.run([*command, "list-models"], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert listed.returncode == 0 and listed.stderr == ""
    for model in {model for models in MODELS.values() for model in models}:
        assert (model in listed.stdout) == (model in MODELS[package])
    if package == "core":
        assert "pip install tpuvid-wan" in listed.stdout
    if package == "tiny":
        done = subprocess.run(
            [*command, "generate", "--model", "wan-tiny", "--prompt", "a blue square growing on a white background",
             "--steps", "2", "-o", "clip.mp4"],
            env=env, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "clip.mp4").stat().st_size > 1000


@pytest.mark.parametrize("package", ["wan", "cogvideox", "hunyuan"])
def test_the_tile_sizes_are_packed(wheels, package):
    assert f"tpuvid_{package}/block_sizes.json" in zipfile.ZipFile(wheels[package]).namelist()


@pytest.fixture(scope="session")
def projects():
    return {p: tomllib.loads((ROOT / "packages" / p / "pyproject.toml").read_text())["project"] for p in ORDER}


def next_version(version: str, part: str) -> str:
    major, minor, patch = map(int, version.split("."))
    return f"{major}.{minor}.{patch + 1}" if part == "patch" else f"{major}.{minor + 1}.0"


def test_each_declares_the_range_of_siblings_that_it_works_with(projects):
    """Its own version says nothing about theirs; a patch of theirs changes nothing for it, and a minor version may."""
    versions = {project["name"]: project["version"] for project in projects.values()}
    for project in projects.values():
        needed = {r.name: r.specifier for r in map(Requirement, project["dependencies"]) if r.name.startswith("tpuvid")}
        assert set(needed) == {f"tpuvid-{p}" for p in ORDER[project["name"].removeprefix("tpuvid-")]} - {project["name"]}
        for name, range_ in needed.items():
            assert versions[name] in range_ and next_version(versions[name], "patch") in range_
            assert next_version(versions[name], "minor") not in range_
    assert tpuvid.__version__ == versions["tpuvid-core"], "make setup"


@pytest.mark.parametrize("package", list(ORDER))
def test_each_has_a_changelog(package):
    assert "## [Unreleased]" in (ROOT / "packages" / package / "CHANGELOG.md").read_text("utf-8")


def test_the_fork_of_diffusers_is_in_the_range(projects):
    """As pip asks, which takes no pre-release that a range doesn't name."""
    ranges = [r.specifier for p in ORDER for r in map(Requirement, projects[p]["dependencies"]) if r.name == "diffusers"]
    assert len(ranges) == 3 and all(range_.contains("0.36.0.dev0") and range_.contains("0.42.1") for range_ in ranges)


@pytest.fixture
def released(tmp_path, projects):
    """The wheel of a core with nothing but the next version of its own."""

    def build(part):
        version = next_version(projects["core"]["version"], part)
        source = tmp_path / part / "core"
        shutil.copytree(ROOT / "packages" / "core", source, ignore=shutil.ignore_patterns("__pycache__", "dist"))
        about = source / "pyproject.toml"
        about.write_text(about.read_text().replace(f'version = "{projects["core"]["version"]}"', f'version = "{version}"'))
        return version, build_wheel(source, tmp_path / part / "copy", tmp_path)

    return build


def test_core_is_released_without_the_others(wheels, released, tmp_path):
    """wan stays as it is: with the next patch of core it works, and the next minor version makes it a row that says so."""
    version, patch = released("patch")
    scripts = install([patch, wheels["wan"]], tmp_path)

    def tpuvid_says(*arguments):
        return subprocess.run(
            [str(scripts / "tpuvid"), *arguments], env=outside(), cwd=tmp_path, capture_output=True, text=True
        )

    listed = tpuvid_says("list-models")
    assert tpuvid_says("--version").stdout.endswith(f"{version}\n")
    assert listed.stderr == "" and all(model in listed.stdout for model in WAN)
    version, minor = released("minor")
    uv("pip", "install", "--quiet", "--python", scripts / "python", "--no-deps", minor, cwd=tmp_path)
    listed = tpuvid_says("list-models")
    assert listed.returncode == 0 and f"needs tpuvid-core<0.2,>=0.1, and {version} is installed" in listed.stderr
    assert not any(model in listed.stdout for model in WAN)


def test_no_registry_host_and_no_lock_file_is_tracked():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    assert "uv.lock" not in files
    hosts = ("pypi" + ".org", "pythonhosted" + ".org", "download.pytorch" + ".org")
    for name in filter(None, files):
        path = ROOT / name
        if path.suffix in {".py", ".toml", ".md", ".sh", ".json", ".yaml", ""} and path.is_file():
            text = path.read_text("utf-8", errors="ignore")
            assert not any(host in text for host in hosts), name
