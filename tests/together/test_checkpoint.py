import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file
from tpuvid.errors import InputError, TpuvidError
from tpuvid.files.checkpoint import Checkpoint
from tpuvid.files.readers import read_json
from tpuvid.files.weights import Weights, weight_files
from tpuvid.plugin.lookup import resolve_model


@pytest.fixture
def folder(tmp_path):
    """A diffusers folder as far as `resolve_model` and `require` look."""
    root = tmp_path / "mine"
    for name, config in {"transformer": {"num_layers": 2}, "vae": {}, "text_encoder": {}}.items():
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text(json.dumps(config))
        save_file({"w": np.zeros(2, np.float32)}, root / name / "model.safetensors")
    for name, file in {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}.items():
        (root / name).mkdir()
        (root / name / file).write_text("{}")
    (root / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    return root


ALL = ("tokenizer", "text_encoder", "transformer", "scheduler", "vae")


def test_a_local_folder_is_found_by_its_class(folder):
    spec, checkpoint = resolve_model(str(folder))
    assert spec.model_id == checkpoint.model_id == str(folder) and spec.family == "wan"
    checkpoint.require(ALL)


def test_a_local_copy_of_a_registered_model_is_its_twin_but_itself(folder):
    """It runs by that model's description, and its files say where its weights are."""
    config = {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    spec, checkpoint = resolve_model(str(folder))
    assert spec.twin == "wan2.1-t2v-1.3b" and spec.defaults.height == 480
    assert spec.model_id == checkpoint.model_id == checkpoint.source == str(folder)


def test_fingerprints_tell_checkpoints_of_one_shape_apart(folder, tmp_path):
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(folder, moved)
    shutil.copytree(folder, other)
    save_file({"w": np.ones(2, np.float32)}, other / "vae" / "model.safetensors")
    prints = [resolve_model(str(path))[1].fingerprint() for path in (folder, moved, other)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    "entry", [{"transformer_2": ["diffusers", "WanTransformer3DModel"]}, {"boundary_ratio": 0.9}, {"expand_timesteps": True}]
)
def test_another_variant_of_the_pipeline_is_refused(folder, entry):
    """Wan 2.2 has the same class and, in each transformer, the same shapes."""
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "WanPipeline", "transformer_2": [None, None], "boundary_ratio": None} | entry)
    )
    with pytest.raises(InputError, match=f"{next(iter(entry))}=.* is not supported by wan yet"):
        resolve_model(str(folder))


def test_of_a_hub_repository_only_what_is_needed_is_fetched(folder, monkeypatch):
    """To know a model, two small files; to run a stage, that stage's components."""
    asked = []

    def snapshot(repo_id, allow_patterns, **_):
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    spec, checkpoint = resolve_model("someone/finetune")
    assert asked == ["model_index.json", "transformer/config.json"]
    checkpoint.require(spec.components["decode"])
    assert asked[2:] == ["vae/*"]
    asked.clear()
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(InputError, match="has no plugin"):
        resolve_model("someone/flux")
    assert asked == ["model_index.json"]


def test_the_hub_id_of_a_registered_model_is_that_model():
    spec, checkpoint = resolve_model("Wan-AI/Wan2.1-T2V-14B-Diffusers")
    assert spec.model_id == "wan2.1-t2v-14b" and checkpoint.repo_id == "Wan-AI/Wan2.1-T2V-14B-Diffusers"


def test_hub_is_read_through_its_own_cache(folder, tmp_path, monkeypatch):
    """A repository that lies in the Hub's cache loads offline."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--me--mine" / "snapshots" / "abc"
    shutil.copytree(folder, snapshot)
    (cache / "models--me--mine" / "refs").mkdir()
    (cache / "models--me--mine" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    spec, checkpoint = resolve_model("me/mine")
    assert spec.model_id == "me/mine" and spec.family == "wan"
    assert checkpoint.component("vae") == snapshot / "vae"


def test_an_unreachable_hub_is_a_run_time_error_with_a_remedy(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TpuvidError, match="nobody/nothing: could not be fetched.*give a local folder") as caught:
        resolve_model("nobody/nothing")
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    "model, message",
    [
        ("./nowhere", "does not exist; give a diffusers folder"),
        ("wan2.1-t2v", "did you mean"),
        ("a/b/c", "is not known"),
        ("", "model is empty"),
        ("-x/y", "is not known"),
        ("foo--bar/..", "is not known|valid Hub id"),
    ],
)
def test_what_is_no_model_is_refused(model, message):
    with pytest.raises(InputError, match=message):
        resolve_model(model)


def test_a_file_is_no_model(folder):
    with pytest.raises(InputError, match="is a file; give a diffusers folder"):
        resolve_model(str(folder / "model_index.json"))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "model_index.json").unlink(), "model_index.json: is missing"),
        (lambda f: (f / "model_index.json").write_text("{"), "no readable JSON"),
        (lambda f: (f / "model_index.json").write_text("[]"), "holds a list"),
        (lambda f: (f / "model_index.json").write_text("{}"), "names no _class_name"),
        (lambda f: (f / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'), "has no plugin"),
        (lambda f: (f / "vae").rename(f / "gone"), "no 'vae' folder"),
        (lambda f: (f / "vae" / "config.json").unlink(), "config.json: is missing"),
        (lambda f: (f / "vae" / "model.safetensors").unlink(), "no .safetensors weights; download it again"),
        (lambda f: (f / "vae" / "model.safetensors").rename(f / "vae" / "model.bin"), "model.bin is a pickle"),
        (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), "scheduler_config.json: is missing"),
    ],
)
def test_an_incomplete_checkpoint_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message):
        _, checkpoint = resolve_model(str(folder))
        checkpoint.require(ALL)


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "../secret.safetensors"}}))
    with pytest.raises(InputError, match="outside its folder"):
        weight_files(tmp_path)
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": []}))
    with pytest.raises(InputError, match="has no weight_map"):
        weight_files(tmp_path)


def test_weights_are_read_piece_by_piece(tmp_path):
    value = np.arange(12, dtype=np.float32).reshape(3, 4)
    save_file({"w": value, "s": np.array(3, np.float32)}, tmp_path / "m.safetensors")
    weights = Weights([tmp_path / "m.safetensors"])
    assert weights["w"] == (3, 4) and set(weights) == {"w", "s"}
    assert np.array_equal(weights.read("w", (slice(1, 3), slice(0, 2))), value[1:3, :2])
    assert np.array_equal(weights.read("w"), value)
    assert weights.read("s", ()) == 3


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "no complete safetensors file"),
        (b"\xff" * 64, "no complete safetensors file"),
        (b"PK\x03\x04 as torch.save has it", "is a pickle under another name"),
        (b"\x80\x04 as pickle.dump has it", "is a pickle under another name"),
    ],
)
def test_foreign_weights_are_refused(tmp_path, content, says):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=says):
        Weights([tmp_path / "m.safetensors"])


def test_truncated_weights_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"w": np.zeros(1000, np.float32)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated or foreign"):
        Weights([path])


def test_json_says_what_it_holds(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="no readable JSON"):
        read_json(tmp_path / "a.json")


def test_package_checkpoint_is_a_folder():
    spec, checkpoint = resolve_model("wan-tiny")
    assert spec.model_id == "wan-tiny" and checkpoint.folder.name == "checkpoint"
    assert isinstance(checkpoint, Checkpoint)
