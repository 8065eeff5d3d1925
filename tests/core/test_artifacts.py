import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tpuvid.contract import Conditioning, GenerationConfig, Latents
from tpuvid.errors import InputError, TpuvidError
from tpuvid.files.atomic import atomic_path, check_output
from tpuvid.files.stage_files import (
    CONFIG,
    EMBEDDINGS,
    LATENTS,
    check_config,
    load_conditioning,
    load_latents,
    read_config,
    read_stage_file,
    save_conditioning,
    save_latents,
    write_tensors,
)

REAL = Path(__file__).parents[3] / "shared" / "data"
CONFIGURED = GenerationConfig(
    prompt="a „cat“\nand 🐕",
    height=64,
    width=96,
    num_frames=17,
    fps=8,
    num_inference_steps=10,
    guidance_scale=4.5,
    flow_shift=3.0,
    seed=2**60,
)


def test_conditioning_round_trip(tmp_path):
    tensors = {
        "prompt_embeds": np.random.default_rng(0).normal(size=(1, 5, 3)).astype(ml_dtypes.bfloat16),
        "negative_prompt_embeds": np.zeros((1, 5, 3), np.float32),
    }
    saved = Conditioning(model_id="m", prompt="a „cat“", negative_prompt="", max_sequence_length=5, tensors=tensors,
                         history={"encode": {"seconds": {"load": 1.5}}}, fingerprint="abc")  # fmt: skip
    loaded = load_conditioning(save_conditioning(tmp_path, saved, overwrite=False))
    assert (loaded.model_id, loaded.prompt, loaded.negative_prompt) == ("m", "a „cat“", "")
    for name, value in tensors.items():
        assert loaded.tensors[name].dtype == value.dtype and np.array_equal(loaded.tensors[name], value)
    assert loaded.max_sequence_length == 5
    assert loaded.history == {"encode": {"seconds": {"load": 1.5}}} and loaded.fingerprint == "abc"
    assert read_config(tmp_path / CONFIG) == {
        "prompt": "a „cat“",
        "negative_prompt": "",
        "max_sequence_length": 5,
        "model_id": "m",
    }


@pytest.mark.parametrize("text", ["None", "12:30", "true"])
def test_a_prompt_that_looks_like_something_else_stays_text(tmp_path, text):
    tensors = {"prompt_embeds": np.zeros((1, 2, 3), np.float32)}
    saved = Conditioning(model_id="m", prompt=text, negative_prompt=text, max_sequence_length=2, tensors=tensors)
    found = load_conditioning(save_conditioning(tmp_path, saved, overwrite=False))
    assert (found.prompt, found.negative_prompt) == (text, text)


def test_latents_round_trip_with_every_setting(tmp_path):
    random = np.random.default_rng(0)
    tensors = {"latents": random.normal(size=(1, 4, 2, 3, 3)), "audio_latents": random.normal(size=(1, 8, 5))}
    saved = Latents(model_id="m", tensors={name: x.astype(np.float32) for name, x in tensors.items()}, config=CONFIGURED)
    file = load_latents(save_latents(tmp_path, saved, overwrite=False))
    assert Latents(**file.result(), config=CONFIGURED).sha256() == saved.sha256()
    for name, x in saved.tensors.items():  # whatever a model makes comes back
        assert np.array_equal(file.tensors[name], x)
    assert GenerationConfig(**file.settings) == CONFIGURED
    assert file.model_id == "m"


@pytest.mark.parametrize(
    "recorded, stored", [("bfloat16", np.float32), ("torch.bfloat16", ml_dtypes.bfloat16), ("torch.bfloat16", np.float32)]
)
def test_both_bfloat16_conventions_are_read(tmp_path, recorded, stored):
    value = np.linspace(-3, 3, 24).reshape(1, 2, 3, 2, 2).astype(ml_dtypes.bfloat16)
    save_file({"latents": value.astype(stored)}, tmp_path / "f", {"dtype_info": json.dumps({"latents": recorded})})
    found = read_stage_file(tmp_path / "f").tensors["latents"]
    assert found.dtype == ml_dtypes.bfloat16 and np.array_equal(found, value)


def test_float32_stays_float32(tmp_path):
    save_file({"latents": np.ones(3, np.float32)}, tmp_path / "f", {"dtype_info": json.dumps({"latents": "float32"})})
    assert read_stage_file(tmp_path / "f").tensors["latents"].dtype == np.float32


@pytest.mark.parametrize("old", ["frames", "num_frames", "video_length"])
def test_old_names_of_the_frame_count(tmp_path, old):
    save_file(
        {"latents": np.zeros((1, 1, 1, 1, 1), np.float32)}, tmp_path / "f", {old: "49", "guidance_scale": "6.0", "other": "x"}
    )
    assert read_stage_file(tmp_path / "f").settings == {"num_frames": 49, "guidance_scale": 6.0}


def test_todays_name_wins_over_an_old_one(tmp_path):
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "f", {"frames": "5", "num_frames": "9"})
    assert read_stage_file(tmp_path / "f").settings == {"num_frames": 9}


@pytest.mark.skipif(not REAL.exists(), reason="the foreign file lies beside the checkout")
def test_a_real_file_of_another_tool():
    file = load_latents(REAL / LATENTS)
    array = file.tensors["latents"]
    assert array.shape == (1, 32, 13, 45, 80) and array.dtype == ml_dtypes.bfloat16
    assert np.isfinite(array.astype(np.float32)).all()
    assert file.settings == {"seed": 42, "guidance_scale": 6.0, "num_frames": 49, "num_inference_steps": 50}
    assert read_config(REAL / CONFIG)["model_id"] == "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v"


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"dtype_info": "{"}, "dtype_info"),
        ({"history": "[]"}, "history"),
        ({"dtype_info": "[1]"}, "dtype_info"),
        ({"history": '{"denoise": 3}'}, "history"),
        ({"num_frames": "many"}, "num_frames='many' is no int"),
    ],
)
def test_damaged_metadata_is_refused(tmp_path, metadata, message):
    save_file({"latents": np.zeros(1, np.float32)}, tmp_path / "f", metadata)
    with pytest.raises(InputError, match=message):
        read_stage_file(tmp_path / "f")


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x10\0\0\0\0\0\0\0{}", b"\xff" * 100])
def test_foreign_files_are_refused(tmp_path, content):
    (tmp_path / EMBEDDINGS).write_bytes(content)
    with pytest.raises(InputError, match="truncated or foreign"):
        load_conditioning(tmp_path / EMBEDDINGS)


@pytest.mark.parametrize("keep", [7, 60, -1])
def test_truncated_files_are_refused(tmp_path, keep):
    write_tensors(tmp_path / LATENTS, {"latents": np.zeros((1, 1, 1, 4, 4), np.float32)}, {}, overwrite=False)
    (tmp_path / LATENTS).write_bytes((tmp_path / LATENTS).read_bytes()[:keep])
    with pytest.raises(InputError, match="truncated or foreign"):
        load_latents(tmp_path / LATENTS)


def test_files_of_the_wrong_stage_are_refused(tmp_path):
    save_file({"frames": np.zeros((1, 2, 2, 2, 3), np.float32)}, tmp_path / "f")
    with pytest.raises(InputError, match="holds the tensors frames, not latents; run tpuvid denoise first"):
        load_latents(tmp_path / "f")
    with pytest.raises(InputError, match="not prompt_embeds; run tpuvid encode first"):
        load_conditioning(tmp_path / "f")
    save_file({"latents": np.zeros((4, 4), np.float32)}, tmp_path / "g")
    with pytest.raises(InputError, match=r"shape \[4, 4\], not \[B, C, f, h, w\]"):
        load_latents(tmp_path / "g")
    with pytest.raises(InputError, match="does not exist"):
        load_latents(tmp_path / "nothing")


def test_existing_files_are_kept(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(InputError, match="already exists; choose another name or pass --overwrite"):
        write_tensors(path, {}, {}, overwrite=False)
    assert path.read_text() == "old"
    write_tensors(path, {"a": np.zeros(2, np.float32)}, {}, overwrite=True)
    assert read_stage_file(path).tensors["a"].shape == (2,)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "f.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path, overwrite=True) as temporary:
        temporary.write_text("half of the ne")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["f.txt"]


def test_another_process_that_was_faster_is_not_overwritten(tmp_path):
    path = tmp_path / "f"
    with pytest.raises(InputError, match="already exists"), atomic_path(path, overwrite=False) as temporary:
        temporary.write_text("mine")
        path.write_text("theirs")
    assert path.read_text() == "theirs" and os.listdir(tmp_path) == ["f"]


def test_a_killed_run_leaves_the_old_file(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    script = f"""
import os, signal
from pathlib import Path
from tpuvid.files.atomic import atomic_path
with atomic_path(Path({str(path)!r}), overwrite=True) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert path.read_text() == "old"


def test_a_full_disk_is_a_run_time_error_and_leaves_nothing(tmp_path):
    """A file-size limit stands in for the disk: the write fails half-way, as on a full one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(TpuvidError, match="can't be written .*; free space or choose another place") as caught:
            write_tensors(tmp_path / "f", {"a": np.zeros(10_000, np.float32)}, {}, overwrite=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.exit_code == 1
    assert os.listdir(tmp_path) == []


def test_outputs_are_checked_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a folder; give a file name"):
        check_output(tmp_path, overwrite=True)
    with pytest.raises(InputError, match="is a file, not a folder"):
        check_output(tmp_path / "file" / "x.mp4", overwrite=False)
    check_output(tmp_path / "new" / "deep" / "x.mp4", overwrite=False)


def test_config_files_are_checked(tmp_path):
    assert read_config(tmp_path / "none.json") == {}
    for text in ("{", "[]"):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(InputError, match="c.json: .*make it again"):
            read_config(tmp_path / "c.json")


def test_settings_that_no_stage_wrote_are_kept(tmp_path):
    (tmp_path / CONFIG).write_text('{"mine": 1}')
    with pytest.raises(InputError, match="is not a stage's settings"):
        check_config(tmp_path, overwrite=False)
    check_config(tmp_path, overwrite=True)
    (tmp_path / CONFIG).write_text('{"model_id": "m"}')
    check_config(tmp_path, overwrite=False)


def test_a_name_that_no_file_can_have_is_refused(tmp_path):
    with pytest.raises(InputError, match="choose a shorter one"):
        check_output(tmp_path / ("x" * 300 + ".mp4"), overwrite=False)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no file system at hand that nobody can write to")
def test_a_place_where_not_even_root_can_write_is_refused_first():
    with pytest.raises(InputError, match="/proc is not writable"):
        check_output(Path("/proc/clip.mp4"), overwrite=False)


def test_a_link_that_leads_nowhere_is_there_too(tmp_path):
    (link := tmp_path / "d.mp4").symlink_to(tmp_path / "nowhere" / "z.mp4")
    with pytest.raises(InputError, match="d.mp4: already exists; choose another name or pass --overwrite"):
        check_output(link, overwrite=False)
