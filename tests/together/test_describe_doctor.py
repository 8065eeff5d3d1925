import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file
from tpuvid.cli.describe import describe, render
from tpuvid.cli.doctor import examine
from tpuvid.cli.main import run
from tpuvid.errors import InputError
from tpuvid.plugin.lookup import resolve_model


def test_a_stage_file(tmp_path, capsys):
    save_file({"latents": np.zeros((1, 4, 2, 3, 3), np.float32)}, tmp_path / "f.safetensors", {"seed": "7"})
    about = describe(tmp_path / "f.safetensors")
    assert about["tensors"] == {"latents": {"dtype": "F32", "shape": [1, 4, 2, 3, 3]}} and about["metadata"] == {"seed": "7"}
    assert run(["inspect", str(tmp_path / "f.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "[1, 4, 2, 3, 3]" in out and "seed = 7" in out
    assert run(["inspect", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"][0]["tensors"] == about["tensors"]


def test_a_checkpoint():
    folder = resolve_model("wan-tiny")[1].folder
    about = describe(folder)
    assert about["pipeline"] == "WanPipeline"
    assert set(about["components"]) == {"scheduler", "text_encoder", "tokenizer", "transformer", "vae"}
    assert about["components"]["vae"]["class"] == "AutoencoderKLWan" and about["components"]["vae"]["parameters"] > 10_000
    text = render(about)
    assert "is missing" not in text and "blocks.*.attn1.to_q.weight" in text and "×6" in text and "num_layers = 6" in text
    component = describe(folder / "transformer")
    assert component["settings"]["num_layers"] == 6 and "proj_out.bias" in component["tensors"]
    assert describe(folder / "model_index.json")["settings"]["_class_name"] == "WanPipeline"


def test_a_missing_component_is_shown(tmp_path):
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "WanPipeline", "vae": ["diffusers", "AutoencoderKLWan"], "x": []})
    )
    assert "vae: AutoencoderKLWan" in render(describe(tmp_path)) and "is missing" in render(describe(tmp_path))


def test_damage_is_an_error_not_a_traceback(tmp_path):
    (tmp_path / "f.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="truncated or foreign"):
        describe(tmp_path / "f.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds neither"):
        describe(tmp_path / "empty")


def test_doctor_finds_nothing_wrong_here(capsys):
    assert run(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "no problems found" in out and "diffusers in use: stock" in out and "wan-tiny" in out
    report = examine()
    assert report["devices"] and report["versions"]["torchax"] == "0.0.13" and not report["problems"]


@pytest.fixture
def fake_diffusers(tmp_path, python_env):
    """Puts a distribution of this name and version, with these modules, before the real one; runs a program that sees it."""

    def make(name, version, modules=()):
        (folder := tmp_path / "diffusers" / "models" / "transformers").mkdir(parents=True)
        for path in (tmp_path / "diffusers" / "__init__.py", *(folder / f"{module}.py" for module in modules)):
            path.write_text("raise AssertionError('nobody imports it')")
        (about := tmp_path / f"{name.replace('-', '_')}-{version}.dist-info").mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

        def run(*command):
            env = python_env | {"PYTHONPATH": str(tmp_path)}
            return subprocess.run(list(map(str, command)), env=env, cwd=tmp_path, capture_output=True, text=True)

        return run

    return make


STOCK, FORK = ("transformer_wan",), ("transformer_wan", "transformer_wan_torchax")


@pytest.mark.parametrize(
    "name, version, modules, says",
    [
        ("diffusers", "0.42.1", STOCK, "stock 0.42.1"),
        ("diffusers", "0.43.0.dev0", STOCK, "stock 0.43.0.dev0"),
        ("diffusers", "0.36.0.dev0", FORK, "fork diffusers-tpu 0.36.0.dev0"),
        ("diffusers-tpu", "0.37.0.dev0", FORK, "fork diffusers-tpu 0.37.0.dev0"),
    ],
)
def test_doctor_tells_the_fork_from_stock(fake_diffusers, name, version, modules, says):
    """By what it holds: the fork's distribution has stock's name, and stock has development versions too."""
    run = fake_diffusers(name, version, modules)
    done = run(sys.executable, "-c", "from tpuvid.files.versions import diffusers_kind; print(diffusers_kind())")
    assert done.stdout == f"{says}\n"


def test_the_fork_is_all_right(fake_diffusers, tpuvid_command):
    run = fake_diffusers("diffusers", "0.36.0.dev0", FORK)
    listed, examined = run(tpuvid_command, "list-models"), run(tpuvid_command, "doctor")
    assert "wan2.1-t2v-14b" in listed.stdout and listed.stderr == ""
    assert "diffusers in use: fork diffusers-tpu 0.36.0.dev0" in examined.stdout and "no problems found" in examined.stdout


def test_doctor_reports_what_is_wrong(monkeypatch, capsys):
    import tpuvid.cli.doctor as doctor

    versions = {
        "diffusers": "0.42.1",
        "diffusers-tpu": "0.37.0.dev0",
        "jax": "1",
        "torch": "1",
        "torchax": "1",
        "av": None,
        "transformers": None,
    }
    monkeypatch.setattr(doctor, "distribution_version", versions.get)
    assert run(["doctor"]) == 1
    out = capsys.readouterr().out
    assert (
        "problem: av is not installed" in out
        and "problem: transformers is not installed" in out
        and "overwrite each other" in out
    )
