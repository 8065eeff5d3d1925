"""`tpuvid plugin new`, as its user goes on: pip install -e, list-models, generate, and its own tests."""

import os
import subprocess
import sys
import time

import pytest
from shared.wheels import Installed
from tpuvid.cli.main import run
from tpuvid.errors import InputError
from tpuvid.plugin.new import FAMILIES, TEMPLATES, new_plugin


@pytest.fixture
def installed(tmp_path):
    return Installed(tmp_path)


@pytest.mark.parametrize(
    "family", [family if place == 0 else pytest.param(family, marks=pytest.mark.slow) for place, family in enumerate(FAMILIES)]
)
def test_it_installs_is_listed_and_generates(family, installed, tmp_path, capsys):
    start = time.perf_counter()
    assert run(["plugin", "new", "my-model", "--family", family, "--output-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    folder = tmp_path / "tpuvid-my-model"
    assert f"plugin: {folder}\n" in said and 'tpuvid generate --model my-model --prompt "a cat"' in said
    installed.install(folder)
    assert "my-model" in installed.tpuvid("list-models")
    installed.tpuvid("generate", "--model", "my-model", "--prompt", "a cat", "-o", "clip.mp4")
    assert (tmp_path / "clip.mp4").stat().st_size > 1000
    print(f"{family}: from plugin new to a video in {time.perf_counter() - start:.1f} s")
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    source = "src/tpuvid_my_model"
    stages = {
        f"{source}/{name}.py" for name in ("__init__", "plugin", "encode", "denoise", "decode", "sharding", "conformance")
    }
    assert files >= stages | {
        "pyproject.toml",
        "README.md",
        ".gitignore",
        ".github/workflows/test.yml",
        "tests/test_tpuvid_my_model.py",
    }
    assert f"{source}/checkpoint/model_index.json" in files
    texts = {path: path.read_text() for path in folder.rglob("*") if path.suffix in (".py", ".toml", ".md", ".yml")}
    assert not [path for path, text in texts.items() if "@name@" in text or "@module@" in text or "@Class@" in text]
    assert all(len(line) <= 128 for path, text in texts.items() if path.suffix == ".py" for line in text.splitlines())


def test_its_own_tests_pass(installed, tmp_path):
    """They are the conformance suite; of the other families, ours are."""
    folder = new_plugin("my-model", "blank", tmp_path)
    installed.install(folder)
    said = installed.run("-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "--rootdir", folder, folder / "tests")
    assert "my-model (tpuvid-my-model 0.1.0): conforms" in said and "1 passed" in said


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("My Model", "for example my-model"),
        ("7days", "needs lower-case letters"),
        ("a--b", "for example a-b"),
        ("ends-", "for example ends"),
        ("", "needs lower-case letters"),
        ("../up", "for example up"),
        ("x" * 41, "needs lower-case letters"),
        ("wan", "an installed plugin or model has it"),
        ("wan-tiny", "an installed plugin or model has it"),
    ],
)
def test_names_that_cannot_be_are_refused_before_anything_is_written(name, remedy, tmp_path, capsys):
    assert run(["plugin", "new", "--output-dir", str(tmp_path), "--", name]) == 2
    error = capsys.readouterr().err
    assert remedy in error and len(error.splitlines()) == 1 and not any(tmp_path.iterdir())


def test_a_folder_that_is_there_stays(tmp_path, capsys):
    (tmp_path / "tpuvid-mine").mkdir()
    (tmp_path / "tpuvid-mine" / "work.py").write_text("mine")
    assert run(["plugin", "new", "mine", "--output-dir", str(tmp_path)]) == 2
    assert "exists; choose another name" in capsys.readouterr().err
    assert (tmp_path / "tpuvid-mine" / "work.py").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_checkpoint_that_cannot_be_made_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tpuvid.plugin.new.sys.executable", "/bin/false")
    with pytest.raises(Exception, match="random checkpoint can't be made here"):
        new_plugin("mine", "blank", tmp_path)
    assert not any(tmp_path.iterdir())


def test_what_a_killed_one_left_is_gone_after_the_next(tmp_path, monkeypatch):
    """The package itself appears whole or not at all."""
    command = [
        sys.executable,
        "-c",
        "from tpuvid.cli.main import main; main()",
        "plugin",
        "new",
        "mine",
        "--output-dir",
        str(tmp_path),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("*/tpuvid-mine/pyproject.toml")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "tpuvid-mine").exists() and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr("tpuvid.plugin.new._make_checkpoint", lambda source, module: None)
    new_plugin("mine", "blank", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tpuvid-mine"]


def test_the_package_that_it_changes_must_be_there(tmp_path, monkeypatch):
    from tpuvid.plugin import new
    from tpuvid.plugin.registry import Registry

    monkeypatch.setattr(new, "registry", lambda: Registry(()))
    with pytest.raises(InputError, match="pip install tpuvid-wan"):
        new_plugin("mine", "wan-like", tmp_path)


def test_templates_are_in_the_package_and_compile():
    for source in TEMPLATES.rglob("*.py.tmpl"):
        text = source.read_text().replace("@api@", "2")
        for word in ("name", "module", "Class", "family"):
            text = text.replace(f"@{word}@", "x")
        compile(text, str(source), "exec")
    assert {folder.name for folder in TEMPLATES.iterdir()} == {"common", *FAMILIES}
    assert os.access(TEMPLATES / "common" / ".gitignore.tmpl", os.R_OK)
