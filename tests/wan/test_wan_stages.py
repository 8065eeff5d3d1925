import gc
import json
import os
import shutil
import weakref
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
import tpuvid
from safetensors.numpy import load_file, save_file
from tpuvid import InputError, TpuvidError
from tpuvid.cli.main import run
from tpuvid.contract import Latents
from tpuvid.family import Runtime
from tpuvid.files.stage_files import EMBEDDINGS, load_conditioning, save_conditioning
from tpuvid.runs.compare import compare
from tpuvid.runs.kept.record import read_record
from tpuvid_wan.denoise import WanDenoiser
from wan.conftest import SMALL


def test_commands_staged_equal_one_shot_bit_for_bit(checkpoint, tmp_path, capsys):
    sampling = ["--height", "32", "--width", "48", "--num_frames", "5", "--steps", "2", "--guidance-scale", "4", "--seed", "5"]
    model = ["--model", str(checkpoint)]
    assert (
        run(["generate", *model, "--prompt", "a cat", *sampling, "-o", str(tmp_path / "one" / "clip.mp4"), "--save-frames"])
        == 0
    )
    stage = str(tmp_path / "staged")
    assert run(["encode", *model, "--prompt", "a cat", "--output-dir", stage]) == 0
    # the stage files say which model made them
    assert run(["denoise", "--input-dir", stage, *sampling]) == 0
    assert run(["decode", "--input-dir", stage, "--save-frames"]) == 0
    frames = [load_file(tmp_path / folder / "stage3_frames.safetensors")["frames"] for folder in ("one", "staged")]
    assert frames[0].shape == (1, 5, 32, 48, 3) and frames[0].dtype == np.float32
    assert 0 <= frames[0].min() and frames[0].max() <= 1
    assert np.array_equal(*frames)
    records = [read_record(tmp_path / name) for name in ("one/clip.mp4", "staged/output_video.mp4")]
    assert all(records[0][name] == records[1][name] for name in ("frames_sha256", "latents_sha256", "fingerprint", "options"))
    assert compare(tmp_path / "one" / "clip.mp4", tmp_path / "staged" / "output_video.mp4").identical
    settings = json.loads((tmp_path / "one" / "clip.json").read_text())
    assert settings["seed"] == 5 and settings["prompt"] == "a cat" and settings["num_frames"] == 5
    staged = json.loads((tmp_path / "staged" / "output_video.json").read_text())
    for history in (settings["history"], staged["history"]):
        assert set(history) == {"encode", "denoise", "decode"}
        assert history["denoise"]["checkpoint"] == str(checkpoint) and history["denoise"]["dtype"] == "float32"
    assert "compile denoiser" in settings["history"]["denoise"]["seconds"]
    assert "seed: 5" in capsys.readouterr().out


def test_seed_decides_and_minus_one_draws(pipe):
    conditioning = pipe.encode("a cat")
    a, b = (pipe.denoise(conditioning, **SMALL | {"seed": seed}) for seed in (1, 2))
    assert not np.array_equal(a.latents, b.latents)
    drawn = pipe.denoise(conditioning, **SMALL | {"seed": -1})
    assert drawn.config.seed >= 0
    again = pipe.denoise(conditioning, **SMALL | {"seed": drawn.config.seed})
    assert np.array_equal(drawn.latents, again.latents)


def test_guidance_off_ignores_the_negative_prompt(pipe):
    config = SMALL | {"guidance_scale": 1.0}
    a, b = (pipe.denoise(pipe.encode("a cat", negative), **config).latents for negative in ("", "moon moon"))
    assert np.array_equal(a, b)
    c = pipe.denoise(pipe.encode("a cat", "moon moon"), **SMALL).latents
    assert not np.array_equal(a, c)


def test_step_callback_counts_and_can_stop(pipe):
    seen = []
    conditioning = pipe.encode("a cat")
    pipe.denoise(conditioning, on_step=lambda done, total: seen.append((done, total)), **SMALL)
    assert seen == [(1, 3), (2, 3), (3, 3)]

    class Cancelled(Exception):
        pass

    def cancel(done, total):
        if done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        pipe.denoise(conditioning, on_step=cancel, **SMALL)


def test_bfloat16_is_close_and_its_files_are_native(checkpoint, pipe, tmp_path):
    half = tpuvid.load(str(checkpoint), dtype="bfloat16")
    conditioning = half.encode("a cat")
    assert conditioning.tensors["prompt_embeds"].dtype == ml_dtypes.bfloat16
    latents = half.denoise(conditioning, **SMALL)
    assert latents.latents.dtype == np.float32
    expected = pipe.denoise(pipe.encode("a cat"), **SMALL).latents
    assert np.abs(latents.latents - expected).max() < 0.1 * np.abs(expected).max()
    frames = half.decode(latents).frames
    assert frames.dtype == np.float32 and np.isfinite(frames).all()
    save_conditioning(tmp_path, conditioning, overwrite=False)
    again = load_conditioning(tmp_path / EMBEDDINGS).tensors["prompt_embeds"]
    assert again.dtype == ml_dtypes.bfloat16 and np.array_equal(again, conditioning.tensors["prompt_embeds"])


def test_timings_belong_to_one_video(checkpoint):
    pipe = tpuvid.load(str(checkpoint))
    first, second = (
        {name for stage in pipe.generate("a cat", **SMALL).history.values() for name in stage["seconds"]} for _ in range(2)
    )
    assert {"load denoiser", "compile denoiser", "denoise", "decode"} <= first
    assert second == {"encode", "denoise", "decode"}, "nothing is loaded or compiled twice"


@pytest.fixture
def no_garbage_collector():
    """Python's own looks for cycles whenever it likes."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_stages_free_their_weights(checkpoint, no_garbage_collector):
    before = len(jax.live_arrays())
    pipe = tpuvid.load(str(checkpoint), keep_loaded=False)
    pipe.generate("a cat", **SMALL)
    assert not pipe._loaded and not pipe._opened
    assert len(jax.live_arrays()) - before < 10, "each stage has tens of parameters"


def test_the_cache_travels_with_the_stage_files(checkpoint, tmp_path, capsys):
    """Its settings and the steps that it served, to the video's record; the same video as in one go, warmed up or not."""
    sampling = ["--height", "32", "--width", "48", "--num-frames", "5", "--steps", "6", "--guidance-scale", "4", "--seed", "5"]
    sampling += ["--cache", "deepcache", "--cache-start-step", "1", "--cache-step-interval", "3"]
    model = ["--model", str(checkpoint)]
    said = "cache: deepcache: full steps 0-1, 4; cached steps 2-3, 5"
    assert run(["generate", *model, "--prompt", "a cat", *sampling, "-o", str(tmp_path / "a.mp4"), "--save-frames"]) == 0
    assert said in capsys.readouterr().out
    folder = ["--input-dir", str(tmp_path / "s")]
    assert (
        run(["encode", *model, "--prompt", "a cat", "--output-dir", str(tmp_path / "s"), "--text-encoder-device", "cpu"]) == 0
    )
    assert run(["denoise", *folder, *sampling, "--warmup-steps", "2", "--profile", str(tmp_path / "profile")]) == 0
    out = capsys.readouterr().out
    assert said in out and f"profile: {tmp_path / 'profile'}" in out
    assert run(["decode", *folder, "--save-frames"]) == 0
    one, staged = (load_file(f / "stage3_frames.safetensors")["frames"] for f in (tmp_path, tmp_path / "s"))
    assert np.array_equal(one, staged)
    about = json.loads((tmp_path / "s" / "output_video.json").read_text())
    assert about["history"]["denoise"]["cache"] == {"name": "deepcache", "full": "0-1, 4", "cached": "2-3, 5", "saved_steps": 3}
    assert (about["cache"], about["cache_start_step"], about["cache_end_step"]) == ("deepcache", 1, 45)


def test_windows_hide_what_is_outside_and_say_what_they_show(checkpoint, tmp_path, capsys):
    size = ["--height", "32", "--width", "48", "--num-frames", "9", "--steps", "2", "--seed", "5", "--overwrite"]
    latents = {}
    assert run(["encode", "--model", str(checkpoint), "--prompt", "a cat", "--output-dir", str(tmp_path)]) == 0
    for window in ("frames=0", "9", None):  # three frames of tokens, 2×3 each
        flags = [] if window is None else ["--window-size", window]
        assert run(["denoise", "--input-dir", str(tmp_path), *size, *flags]) == 0
        said = capsys.readouterr().out
        latents[window] = load_file(tmp_path / "stage2_latents.safetensors")["latents"]
        assert {
            "frames=0": "window: a token sees 0 frames of tokens (0 of the video) to either side",
            "9": "all tokens: it hides nothing",
        }.get(window, "") in said
    assert np.array_equal(latents["9"], latents[None]) and not np.allclose(latents["frames=0"], latents[None], atol=1e-3)


def test_windows_and_int8_are_refused_together(checkpoint):
    pipe = tpuvid.load(str(checkpoint))
    pipe.runtime = replace(pipe.runtime, attention_backend="flash-int8")
    with pytest.raises(InputError, match="window_size=frames=8: attention_backend=flash-int8 has no windows"):
        pipe.generate("a cat", **SMALL, window_size=8)
    assert not pipe._loaded


def test_the_record_says_the_checkpoints_own_shift(checkpoint, pipe):
    own = json.loads((checkpoint / "scheduler" / "scheduler_config.json").read_text())["flow_shift"]
    assert pipe.denoise(pipe.encode("a cat"), **SMALL).config.flow_shift == own
    assert pipe.denoise(pipe.encode("a cat"), **SMALL | {"flow_shift": 2.5}).config.flow_shift == 2.5


def test_text_encoders_leave_an_accelerators_memory_before_denoising(checkpoint, monkeypatch, no_garbage_collector):
    """Their arrays are gone, not only forgotten, when the denoiser's weights are read. (A CPU counts as accelerator here.)"""
    monkeypatch.setattr(Runtime, "text_encoder_shares_memory", True)
    pipe = tpuvid.load(str(checkpoint))
    conditioning = pipe.encode("a cat")
    weights = weakref.ref(pipe._opened["encode"].params["shared.weight"])
    assert weights() is not None
    left = []
    monkeypatch.setattr(WanDenoiser, "load", lambda self, load=WanDenoiser.load: left.append(weights()) or load(self))
    pipe.denoise(conditioning, **SMALL)
    assert left == [None]
    assert np.array_equal(pipe.encode("a cat").tensors["prompt_embeds"], conditioning.tensors["prompt_embeds"])


def test_checkpoint_in_shards(checkpoint, pipe, tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(checkpoint, folder)
    single = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(single)
    names = sorted(tensors)
    shards = {"a-00001-of-00002.safetensors": names[::2], "a-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, single.with_name(file))
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    single.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    single.unlink()
    conditioning = pipe.encode("a cat")
    expected = pipe.denoise(conditioning, **SMALL).latents
    sharded = tpuvid.load(str(folder))
    renamed = type(conditioning)(**{**vars(conditioning), "model_id": "", "fingerprint": None})
    assert np.array_equal(sharded.denoise(renamed, **SMALL).latents, expected)

    (folder / "transformer" / "a-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="1 of 2 shards are missing"):
        tpuvid.load(str(folder)).denoise(renamed, **SMALL)


def edit_weights(checkpoint, folder, edit):
    shutil.copytree(checkpoint, folder)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    return tpuvid.load(str(folder))


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.pop("blocks.1.ffn.net.2.bias"), r"1 missing \(blocks.1.ffn.net.2.bias\)"),
        (lambda t: t.update(stray=np.zeros(3, np.float32)), r"1 left over \(stray\)"),
        (lambda t: t.update({"proj_out.bias": np.zeros(3, np.float32)}), "proj_out.bias has shape"),
    ],
)
def test_weights_that_do_not_match_are_named(checkpoint, tmp_path, edit, message):
    pipe = edit_weights(checkpoint, tmp_path / "random-wan", edit)
    with pytest.raises(InputError, match=message):
        pipe.generate("a cat", **SMALL)


def test_inputs_are_refused_before_weights_are_read(checkpoint, tmp_path, forbid_weights):
    """The transformer's weights are unreadable here; each error must come first."""
    pipe = tpuvid.load(str(checkpoint))
    conditioning = pipe.encode("a cat")
    latents = pipe.denoise(conditioning, **SMALL)

    forbid_weights()
    pipe.free()

    other = replace(conditioning, model_id="wan-tiny", fingerprint=None)
    with pytest.raises(InputError, match="made by wan-tiny, which is another checkpoint than .*random-wan"):
        pipe.denoise(other, **SMALL)
    wide = replace(conditioning, tensors={k: np.zeros((1, 512, 4096), np.float32) for k in conditioning.tensors})
    with pytest.raises(InputError, match=r"takes \[1, L, 24\]"):
        pipe.denoise(wide, **SMALL)
    short = replace(
        conditioning, tensors=dict(conditioning.tensors) | {"negative_prompt_embeds": np.zeros((1, 226, 24), np.float32)}
    )
    with pytest.raises(InputError, match=r"negative_prompt_embeds is float32 \[1, 226, 24\]"):
        pipe.denoise(short, **SMALL)
    broken = replace(conditioning, tensors={k: np.full_like(v, np.nan) for k, v in conditioning.tensors.items()})
    with pytest.raises(InputError, match="prompt_embeds holds NaN or infinity; encode again"):
        pipe.denoise(broken, **SMALL)
    positive = replace(conditioning, tensors={"prompt_embeds": conditioning.tensors["prompt_embeds"]})
    with pytest.raises(InputError, match="pass guidance_scale=1.0"):
        pipe.denoise(positive, **SMALL)
    with pytest.raises(InputError, match="num_frames=8: needs 4n.1 frames up to 4093; nearest: 5 and 9"):
        pipe.denoise(conditioning, **SMALL | {"num_frames": 8})
    foreign = replace(latents, tensors={"latents": np.zeros((1, 32, 3, 4, 6), np.float32)})
    with pytest.raises(InputError, match=r"takes \[B, 4, f, h, w\]"):
        pipe.decode(foreign)
    with pytest.raises(InputError, match="these latents were made by other"):
        pipe.decode(replace(latents, model_id="other", fingerprint=None))
    for damage in (
        np.full_like(latents.latents, np.nan),
        np.zeros((1, 4, 0, 4, 6), np.float32),
        np.zeros((1, 4, 3, 4, 6), np.int64),
    ):
        with pytest.raises(InputError, match="denoise again"):
            pipe.decode(replace(latents, tensors={"latents": damage}))


def test_second_process_run_compiles_nothing(checkpoint, tmp_path, tpuvid_command):
    """The persistent cache: a second run adds no program to it and reads all of them."""
    import subprocess

    env = os.environ | {"TPUVID_CACHE_DIR": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    command = [tpuvid_command, "generate", "--model", str(checkpoint), "--prompt", "a cat", "--height", "32", "--width", "32",
               "--num-frames", "5", "--steps", "2", "--overwrite", "-o", str(tmp_path / "clip.mp4")]  # fmt: skip

    def programs():
        subprocess.run(command, env=env, check=True, capture_output=True)
        history = json.loads((tmp_path / "clip.json").read_text())["history"]
        seconds = {name: value for stage in history.values() for name, value in stage["seconds"].items()}
        files = {p.name for p in (tmp_path / "cache" / "xla").iterdir() if p.name.endswith("-cache")}
        return files, sum(s for name, s in seconds.items() if name.startswith("compile"))

    first, cold = programs()
    second, warm = programs()
    assert first and second == first
    assert warm < cold


def test_wan_2_2_vae_is_refused(checkpoint, tmp_path):
    folder = tmp_path / "random-wan"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"patch_size": 2}))
    pipe = tpuvid.load(str(folder))
    latents = Latents(model_id="", tensors={"latents": np.zeros((1, 4, 1, 2, 2), np.float32)}, config=pipe.spec.defaults)
    with pytest.raises(InputError, match="Wan 2.2"):
        pipe.decode(latents)


def test_unknown_scheduler_is_refused(checkpoint, tmp_path):
    folder = tmp_path / "random-wan"
    shutil.copytree(checkpoint, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "HeunDiscreteScheduler"}))
    pipe = tpuvid.load(str(folder))
    with pytest.raises(InputError, match="HeunDiscreteScheduler"):
        pipe.generate("a cat", **SMALL)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "tokenizer" / "tokenizer_config.json").write_text("{}"), "tokenizer, text_encoder can't be used"),
        (lambda f: (f / "text_encoder" / "config.json").write_text("{}"), "tokenizer, text_encoder can't be used"),
        (lambda f: edit_json(f / "transformer" / "config.json", num_layers="two"), "transformer, scheduler can't be used"),
        (
            lambda f: edit_json(f / "transformer" / "config.json", num_layers=3),
            r"transformer: weights don't match config.json: 2\d missing",
        ),
        (lambda f: edit_json(f / "vae" / "config.json", base_dim=8), "vae: .* has shape .*, config.json asks for"),
        (lambda f: edit_json(f / "vae" / "config.json", patch_size=2), "Wan 2.2"),
        (
            lambda f: edit_json(f / "scheduler" / "scheduler_config.json", solver_type="bh1"),
            "scheduler_config.json: .* infinite or undefined",
        ),
        (lambda f: truncate(f / "vae" / "diffusion_pytorch_model.safetensors"), "truncated or foreign"),
    ],
)
def test_a_broken_checkpoint_is_found_before_the_first_weight_is_read(checkpoint, tmp_path, forbid_weights, damage, message):
    """Even what only the last stage would have met."""
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    damage(folder)
    forbid_weights()
    with pytest.raises(InputError, match=message):
        tpuvid.load(str(folder)).generate("a cat", **SMALL)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-50])


def test_weights_that_give_nan_make_no_video(checkpoint, tmp_path):
    pipe = edit_weights(
        checkpoint, tmp_path / "nan", lambda t: t.update({"proj_out.bias": np.full_like(t["proj_out.bias"], np.nan)})
    )
    with pytest.raises(TpuvidError, match="latents hold NaN or infinity"):
        pipe.generate("a cat", **SMALL)


def test_stage_files_lead_to_the_weights_that_made_them(checkpoint, tmp_path):
    """A fine-tune in a folder has the shapes of its base; each stage must still run with it, and refuse another."""
    fine_tune = tmp_path / "fine-tune"
    edit_weights(checkpoint, fine_tune, lambda t: t.update({"proj_out.bias": t["proj_out.bias"] + 0.1}))
    conditioning = tpuvid.load(str(fine_tune)).encode("a cat")
    assert conditioning.model_id == str(fine_tune)
    with pytest.raises(InputError, match="made by .*fine-tune, which is another checkpoint than .*random-wan"):
        tpuvid.load(str(checkpoint)).denoise(conditioning, **SMALL)
    moved = tmp_path / "moved"
    fine_tune.rename(moved)
    tpuvid.load(str(moved)).denoise(conditioning, **SMALL)


def test_flow_shift_follows_the_resolution(pipe):
    from tpuvid_wan.plugin import WAN_1_3B, WAN_14B

    assert WAN_14B.configure().flow_shift == 5.0
    assert WAN_1_3B.configure().flow_shift == 3.0
    assert WAN_14B.configure(height=480, width=832).flow_shift == 3.0
    assert WAN_14B.configure(height=64, width=64).flow_shift is None
    assert WAN_14B.configure(flow_shift=7.5).flow_shift == 7.5
    conditioning = pipe.encode("a cat")
    own, other = (pipe.denoise(conditioning, **SMALL, flow_shift=shift).latents for shift in (None, 9.0))
    assert not np.array_equal(own, other)
