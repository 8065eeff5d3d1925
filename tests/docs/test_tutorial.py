"""docs/plugins.md, typed by its reader: every file is written, every command run, in an environment of its own; and the plugins
that docs/extending.md shows."""

import shutil
import subprocess
from importlib.metadata import EntryPoint

import numpy as np
import pytest
from docs.blocks import blocks
from shared.wheels import Installed
from tpuvid.cli.main import run
from tpuvid.files.mp4 import save_mp4
from tpuvid.plugin.registry import load_plugins
from tpuvid_wan import plugin as wan

PAGE = "docs/plugins.md"


@pytest.fixture
def installed(tmp_path):
    return Installed(tmp_path)


def typed(words: list[str], installed: Installed, code: int) -> str:
    match words:
        case ["tpuvid", *arguments]:
            return installed.tpuvid(*arguments, code=code)
        case ["pip", "install", "-e", folder]:
            return installed.install(installed.folder / folder) or ""
        case ["sed", *_]:
            return subprocess.run(words, cwd=installed.folder, check=True, capture_output=True, text=True).stdout
    raise AssertionError(f"the tutorial says {words}, which nothing here runs")


def test_the_tutorial_runs_as_it_stands(installed):
    said, ran = "", []
    for block in blocks(PAGE):
        if block.is_file:
            path = installed.folder / block.title
            assert path.parent.is_dir(), f"{block.where}: is no folder of the package"
            path.write_text(block.text + "\n")
        elif block.language == "sh":
            said = ""
            for words in block.commands():
                said += typed(words, installed, block.exit_code)
                ran.append(words[:3])
        elif block.title == "prints":
            for line in block.text.splitlines():
                assert line in said, f"{block.where}: {line!r} was not printed:\n{said}"
    assert ["tpuvid", "plugin", "new"] in ran and ran.count(["tpuvid", "plugin", "check"]) == 3
    assert (installed.folder / "noise.mp4").stat().st_size > 1000
    installed.run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", installed.folder / "tpuvid-clouds" / "tests"
    )


HOOKS = [block for block in blocks("docs/extending.md") if block.is_file and block.language == "python"]


@pytest.mark.parametrize("block", HOOKS, ids=lambda block: block.title)
def test_the_hooks_that_are_shown_register_something(block, tmp_path, monkeypatch):
    (tmp_path / block.title).write_text(block.text + "\n")
    (table,) = wan.tpuvid_block_sizes()
    shutil.copy(table, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    registry = load_plugins([EntryPoint("clouds", block.title.removesuffix(".py"), "tpuvid")])
    assert not registry.problems and registry.plugins[0].provides


def test_the_command_that_is_shown_runs(tmp_path, monkeypatch, capsys):
    (block,) = [block for block in HOOKS if "tpuvid_commands" in block.text]
    (tmp_path / block.title).write_text(block.text + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    known = load_plugins([EntryPoint("clouds", block.title.removesuffix(".py"), "tpuvid")])
    monkeypatch.setattr("tpuvid.cli.commands.registry", lambda: known)
    video = save_mp4(np.zeros((1, 16, 16, 3), np.float32), tmp_path / "clip.mp4", fps=8, metadata={"prompt": "a red circle"})
    assert run(["prompt-of", str(video)]) == 0 and capsys.readouterr().out == "a red circle\n"
    assert run(["--help"]) == 0 and "What a video was asked to show." in capsys.readouterr().out


def test_every_hook_is_shown():
    from tpuvid.contract import hookspecs

    named = {name for name in vars(hookspecs) if name.startswith("tpuvid_")}
    shown = {name for name in named if any(name in block.text for block in HOOKS)}
    assert named - shown == {"tpuvid_models"}, "which docs/plugins.md is about"
