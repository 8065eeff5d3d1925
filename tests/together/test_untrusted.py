"""Checkpoints that someone has prepared: refused with a line, before any weight is loaded and with nothing run."""

import json
import os
import re
import shutil
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tpuvid.cli.main import run
from tpuvid.errors import InputError
from tpuvid.files.readers import read_json
from tpuvid.files.untrusted import MOST_HEADER, check_links
from tpuvid.files.weights import Weights

TINY = Path(str(files("tpuvid_tiny"))) / "checkpoint"


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    return tmp_path / "model"


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def weights_of(folder, component):
    return next((folder / component).glob("*.safetensors"))


def as_pickle(folder):
    path = weights_of(folder, "transformer")
    path.with_suffix(".bin").write_bytes(path.read_bytes())
    path.unlink()


def link_out(folder):
    path = weights_of(folder, "vae")
    path.rename(folder.parent / "elsewhere.safetensors")
    path.symlink_to(folder.parent / "elsewhere.safetensors")


def link_folder_out(folder):
    (folder / "tokenizer").rename(folder.parent / "tokenizer")
    (folder / "tokenizer").symlink_to(folder.parent / "tokenizer")


def index_is_a_device(folder):
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").symlink_to("/dev/zero")


def index_is_elsewhere(folder):
    (folder / "model_index.json").rename(folder.parent / "elsewhere.json")
    (folder / "model_index.json").symlink_to(folder.parent / "elsewhere.json")


def index_of(weight_map):
    def damage(folder):
        (folder / "transformer" / "x.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return damage


def twice_in_shards(folder):
    path = weights_of(folder, "transformer")
    shutil.copy(path, path.with_name("b.safetensors"))
    index_of({"a": path.name, "b": "b.safetensors"})(folder)


def header(text, body=b""):
    def damage(folder):
        weights_of(folder, "transformer").write_bytes(len(text).to_bytes(8, "little") + text + body)

    return damage


def number(component, name, value):
    return lambda folder: change(folder / component / "config.json", **{name: value})


TENSOR = b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'


@pytest.mark.parametrize(
    "damage, says",
    [
        (as_pickle, "is a pickle and is not read; convert it"),
        (link_out, "is a link out of the checkpoint"),
        (link_folder_out, "is a link out of the checkpoint"),
        (index_of({"a": "../../elsewhere.safetensors"}), "names files outside its folder"),
        (index_of({"a": "/etc/passwd"}), "names files outside its folder"),
        (index_of([]), "has no weight_map"),
        (index_of({"a": ["x"]}), "shards are missing"),
        (index_of({"a": ".."}), "names files outside its folder"),
        (lambda f: os.mkfifo(f / "vae" / "foo.json"), "is neither a file nor a folder"),
        (lambda f: (f / "vae" / "foo.json").symlink_to("nowhere"), "leads nowhere"),
        (index_is_a_device, "is neither a file nor a folder"),
        (index_is_elsewhere, "is a link out of the checkpoint"),
        (lambda f: change(f / "scheduler/scheduler_config.json", num_train_timesteps=2**40), "no model has more than"),
        (twice_in_shards, "as another shard does"),
        (header(b"{" + TENSOR + b", " + TENSOR + b"}", bytes(4)), "gives 'a' twice"),
        (header(b'{"a": {"dtype": "F32", "shape": [99999999999, 9999], "data_offsets": [0, 4]}}', bytes(4)), "no complete"),
        (header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 999999999999]}}', bytes(4)), "no complete"),
        (header(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', bytes(4)), "no complete"),
        (header(b"[" * 50_000 + b"]" * 50_000), "nested too deep"),
        (number("transformer", "num_layers", 10**9), "num_layers=1000000000: no model has more than 1,024"),
        (number("transformer", "num_attention_heads", 10**30), "no model has more than"),
        (number("vae", "base_dim", 2**40), "no model has more than"),
        (number("transformer", "ffn_dim", -(2**40)), "no model has more than"),
        (number("text_encoder", "auto_map", {"AutoConfig": "evil.Config"}), "asks to run code of its own"),
        (
            lambda f: change(f / "tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}),
            "code of its own",
        ),
        (
            lambda f: (f / "transformer/config.json").write_text('{"num_layers": 1, "num_layers": 2}'),
            "gives 'num_layers' twice",
        ),
        (lambda f: (f / "model_index.json").write_text("[" * 100_000), "nested too deep"),
    ],
)
def test_a_prepared_checkpoint_is_refused(folder, tmp_path, capsys, forbid_weights, damage, says):
    damage(folder)
    forbid_weights()
    code = run(["generate", "-q", "--model", str(folder), "--prompt", "x", "-o", str(tmp_path / "x.mp4")])
    err = capsys.readouterr().err
    assert code == 2 and says in err and err.count("\n") == 1, err
    assert not (tmp_path / "x.mp4").exists()


def test_a_header_bomb_is_not_read(tmp_path):
    """A header that is said to be (and is) huge: refused by its size, before a byte of it is parsed."""
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write((MOST_HEADER + 1).to_bytes(8, "little"))
        file.truncate(MOST_HEADER + 100)
    with pytest.raises(InputError, match="which no model needs"):
        Weights([path])


def test_a_config_of_gigabytes_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(10 * 2**30)
    with pytest.raises(InputError, match="are the most that are read"):
        read_json(tmp_path / "config.json")


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    """snapshots/<commit>/vae/config.json → ../../../blobs/<hash>, and nowhere else."""
    vae = tmp_path / "models--a--b" / "snapshots" / "0123" / "vae"
    vae.mkdir(parents=True)
    blob = tmp_path / "models--a--b" / "blobs" / "ff"
    blob.parent.mkdir()
    blob.write_text("{}")
    (vae / "config.json").symlink_to("../../../blobs/ff")
    check_links(vae.parent, vae)
    (tmp_path / "models--a--b" / "refs").write_text("")
    (vae / "other.json").symlink_to("../../../refs")
    with pytest.raises(InputError, match="other.json: is a link out"):
        check_links(vae.parent, vae)


def test_a_lora_as_a_pickle_is_refused(tmp_path, capsys):
    (tmp_path / "lora.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    code = run(["generate", "--model", "wan-tiny", "--prompt", "x", "-o", str(tmp_path / "x.mp4"),
                "--lora-path", str(tmp_path / "lora.safetensors")])  # fmt: skip
    assert code == 2 and "is a pickle under another name" in capsys.readouterr().err


def test_nothing_unpickles_or_runs_what_it_is_given():
    """Outside packs, which say so and ask first, no module of ours names what could."""
    root = Path(__file__).parents[2] / "packages"
    forbidden = (
        "pickle",
        "torch.load",
        "trust_remote_code=True",
        "shell=True",
        "os.system",
        "eval(",
        "exec(",
        "allow_pickle=True",
    )
    found = [
        f"{path.relative_to(root)}: {word}"
        for path in root.glob("*/src/**/*.py")
        for word in forbidden
        if re.search(rf"(?<![\w.]){re.escape(word)}", path.read_text("utf-8"))
    ]
    allowed = (
        "core/src/tpuvid/compute/packs/pack.py: pickle",
        "core/src/tpuvid/files/untrusted.py: pickle",
        "core/src/tpuvid/files/weights.py: pickle",
    )
    assert [line for line in found if line not in allowed] == []


def test_weights_are_read_of_whole_files_only(tmp_path):
    save_file({"w": np.zeros(4, np.float32)}, tmp_path / "a.safetensors")
    assert dict(Weights([tmp_path / "a.safetensors"])) == {"w": (4,)}


def test_a_folder_that_is_no_checkpoint_is_not_walked_through(tmp_path, capsys, monkeypatch):
    """It may be a whole disk."""
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    monkeypatch.setattr(Path, "rglob", lambda *_: pytest.fail("it was walked through"))
    assert run(["encode", "--model", str(tmp_path), "--prompt", "x", "--output-dir", str(tmp_path / "out")]) == 2
    assert "model_index.json" in capsys.readouterr().err
