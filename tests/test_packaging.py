"""Each package as a user gets it: built to a wheel, installed into an empty environment outside the workspace."""

import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
from shared.wheels import build_wheel, install, outside

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


@pytest.mark.parametrize("package", list(ORDER))
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


def test_siblings_are_in_lockstep():
    projects = {p: tomllib.loads((ROOT / "packages" / p / "pyproject.toml").read_text())["project"] for p in ORDER}
    (version,) = {project["version"] for project in projects.values()}
    for project in projects.values():
        for dependency in project["dependencies"]:
            if dependency.startswith("tpuvid"):
                assert dependency.endswith(f"=={version}")
    import tpuvid

    assert tpuvid.__version__ == version


def test_no_registry_host_and_no_lock_file_is_tracked():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    assert "uv.lock" not in files
    hosts = ("pypi" + ".org", "pythonhosted" + ".org", "download.pytorch" + ".org")
    for name in filter(None, files):
        path = ROOT / name
        if path.suffix in {".py", ".toml", ".md", ".sh", ".json", ".yaml", ""} and path.is_file():
            text = path.read_text("utf-8", errors="ignore")
            assert not any(host in text for host in hosts), name
