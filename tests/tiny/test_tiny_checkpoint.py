"""The shipped folder: complete, small, safe, and of the plain Wan 2.1 layout."""

import json
from pathlib import Path

import pytest
import tpuvid_tiny

FOLDER = Path(tpuvid_tiny.__file__).parent / "checkpoint"
LARGEST = 15_000_000  # bytes


def config(name: str) -> dict:
    return json.loads((FOLDER / name).read_text())


def test_folder_is_complete_and_small():
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    names = {file.relative_to(FOLDER).as_posix() for file in files}
    assert {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    } <= names
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    assert sum(file.stat().st_size for file in files) <= LARGEST


def test_layout_is_plain_wan():
    vae, transformer, scheduler = (
        config(f"{part}.json") for part in ("vae/config", "transformer/config", "scheduler/scheduler_config")
    )
    assert config("model_index.json")["_class_name"] == "WanPipeline"
    assert (vae["z_dim"], vae["is_residual"], vae["patch_size"]) == (16, False, None)
    assert vae["temperal_downsample"] == [False, True, True]
    assert len(vae["latents_mean"]) == len(vae["latents_std"]) == 16
    assert (transformer["patch_size"], transformer["in_channels"], transformer["out_channels"]) == ([1, 2, 2], 16, 16)
    assert (scheduler["prediction_type"], scheduler["use_flow_sigmas"]) == ("flow_prediction", True)


def test_no_config_tells_where_it_was_made():
    for file in FOLDER.rglob("*.json"):
        assert "_name_or_path" not in file.read_text()


def test_tokenizer_reads_whole_words():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(FOLDER / "tokenizer")
    upper, lower = tokenizer(["A RED circle, Moving right.", "a red circle moving right"]).input_ids
    assert upper == lower
    assert len(lower) == 6  # five words and the end mark
    assert tokenizer.unk_token_id not in lower
    assert tokenizer("zebra").input_ids == [tokenizer.unk_token_id, tokenizer.eos_token_id]
