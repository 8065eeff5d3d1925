"""``tpuvid generate`` for people who make videos all day: batches, sweeps, reruns, records, reproducing, stopping."""

import html
import json
import re
import shlex
import signal
import time
import weakref
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import tpuvid
from PIL import Image
from shared.pipes import kept
from shared.processes import COMMAND, Forked
from tpuvid.cli.main import run
from tpuvid.contract import Latents
from tpuvid.errors import InputError
from tpuvid.files.digests import file_sha256, sealed
from tpuvid.files.mp4 import read_metadata, save_mp4
from tpuvid.files.stage_files import read_stage_file
from tpuvid.runs.kept.record import read_record
from tpuvid.runs.outputs import Outputs
from tpuvid.runs.pipeline import Pipeline

RED, BLUE = "a red circle growing on a black background", "a blue square growing on a white background"
QUICK = {"--steps": "2", "--num-frames": "5"}


def generate(*arguments):
    words = list(map(str, arguments))
    quick = [word for flag, value in QUICK.items() if flag not in words for word in (flag, value)]
    return run(["generate", "--model", "wan-tiny", *quick, *words])


def names(folder, suffix=".mp4"):
    return sorted(path.name for path in Path(folder).glob(f"*{suffix}"))


def left_over(folder):
    """Work that is not done yet, and temporary files."""
    return [path.name for path in Path(folder).iterdir() if path.name.startswith(".")]


@pytest.fixture(autouse=True)
def open_pipes(request, monkeypatch):
    """Command lines use pipelines that others have opened, but in tests that ask for `new_pipes`."""
    if "new_pipes" not in request.fixturenames:
        monkeypatch.setattr("tpuvid.load", kept)


@pytest.fixture
def new_pipes():
    """What is loaded is part of the test."""


@pytest.fixture
def calls(monkeypatch):
    """What each stage was asked for."""
    seen = {"encode": [], "denoise": [], "decode": [], "load": []}
    encode, denoise, decode, stage = Pipeline.encode_config, Pipeline.denoise_batch, Pipeline.decode_chunks, Pipeline._stage

    def encode_config(self, config, **how):
        seen["encode"].append(config.prompt)
        return encode(self, config, **how)

    def denoise_batch(self, conditionings, configs, **how):
        seen["denoise"].append([config.seed for config in configs])
        return denoise(self, conditionings, configs, **how)

    def decode_chunks(self, latents):
        seen["decode"].append(latents.config.seed)
        return decode(self, latents)

    def one_stage(self, name, *args):
        if name not in self._loaded:
            seen["load"].append(name)
        return stage(self, name, *args)

    monkeypatch.setattr(Pipeline, "encode_config", encode_config)
    monkeypatch.setattr(Pipeline, "denoise_batch", denoise_batch)
    monkeypatch.setattr(Pipeline, "decode_chunks", decode_chunks)
    monkeypatch.setattr(Pipeline, "_stage", one_stage)
    return seen


def test_a_batch_goes_through_each_stage_once_and_a_rerun_makes_what_is_missing(tmp_path, capsys, calls, new_pipes):
    (tmp_path / "p.csv").write_text(f'prompt,seed,guidance_scale,output\n"{RED}",1,,\n"{BLUE}",7,1.0,mine.mp4\n')
    batch = ["--prompts", tmp_path / "p.csv", "--num-videos", 2, "--output-dir", tmp_path / "out", "--batch-size", 2]
    assert generate(*batch) == 0
    assert calls["load"] == ["encode", "denoise", "decode"]
    assert calls["encode"] == [RED, BLUE] and calls["denoise"] == [[1, 2], [7, 8]] and calls["decode"] == [1, 2, 7, 8]
    slug = RED.replace(" ", "-")
    assert names(tmp_path / "out") == [f"{slug}_1.mp4", f"{slug}_2.mp4", "mine.mp4", "mine_2.mp4"]
    assert "videos: 4 made, 0 there already, 0 failed" in capsys.readouterr().out
    assert left_over(tmp_path / "out") == []

    for seen in calls.values():
        seen.clear()
    assert generate(*batch) == 0 and calls["load"] == []
    assert "videos: 0 made, 4 there already, 0 failed" in capsys.readouterr().out
    (tmp_path / "out" / "mine.mp4").unlink()
    data = bytearray((tmp_path / "out" / f"{slug}_2.mp4").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "out" / f"{slug}_2.mp4").write_bytes(data)
    assert generate(*batch) == 2, "a video that is not as it was written is not replaced silently"
    assert f"{slug}_2.mp4: already exists" in capsys.readouterr().err
    assert generate(*batch, "--overwrite") == 0 and calls["decode"] == [2, 7]


def test_a_batch_never_takes_another_files_name(tmp_path, capsys):
    (tmp_path / "p.txt").write_text(f"{RED}\n")
    slug = RED.replace(" ", "-")
    (tmp_path / f"{slug}_42.mp4").write_text("mine")
    assert generate("--prompts", tmp_path / "p.txt", "--output-dir", tmp_path) == 2
    error = capsys.readouterr().err
    assert "p.txt, line 1: " in error and "already exists" in error and error.count("\n") == 1
    assert (tmp_path / f"{slug}_42.mp4").read_text() == "mine"


def test_same_names_are_told_apart_and_the_same_video_twice_is_refused(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "{RED}"}}\n{{"prompt": "{RED}", "guidance_scale": 2}}\n')
    assert generate("--prompts", tmp_path / "p.jsonl", "--output-dir", tmp_path / "out") == 0
    stems = [re.fullmatch(rf"{RED.replace(' ', '-')}_42_[0-9a-f]{{6}}.mp4", name) for name in names(tmp_path / "out")]
    assert len(stems) == 2 and all(stems)
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "{RED}"}}\n{{"prompt": "{RED}", "seed": 42}}\n')
    assert generate("--prompts", tmp_path / "p.jsonl", "--output-dir", tmp_path / "out") == 2
    assert "line 2: has the prompt, the seed and all settings of" in capsys.readouterr().err


def test_drawn_seeds_are_kept_for_the_rerun(tmp_path, capsys, calls):
    (tmp_path / "p.txt").write_text(f"{RED}\n")
    batch = ["--prompts", tmp_path / "p.txt", "--num-videos", 2, "--seed", -1, "--output-dir", tmp_path / "out"]
    assert generate(*batch) == 0
    first = names(tmp_path / "out")
    seeds = {json.loads((tmp_path / "out" / name).with_suffix(".json").read_text())["seed"] for name in first}
    assert len(seeds) == 2 and all(f"_{seed}.mp4" in " ".join(first) for seed in seeds)
    capsys.readouterr()
    assert generate(*batch) == 0 and names(tmp_path / "out") == first
    assert "0 made, 2 there already" in capsys.readouterr().out


def failing_on(monkeypatch, word, error):
    denoise = Pipeline.denoise_batch

    def sometimes(self, conditionings, configs, **how):
        if any(word in config.prompt for config in configs):
            raise error
        return denoise(self, conditionings, configs, **how)

    monkeypatch.setattr(Pipeline, "denoise_batch", sometimes)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_one_failed_item_does_not_stop_the_rest(tmp_path, capsys, batch_size):
    (tmp_path / "p.txt").write_text(f"{RED}\n{BLUE}\na green square growing on a black background\n")
    batch = ["--prompts", tmp_path / "p.txt", "--output-dir", tmp_path / "out", "--batch-size", batch_size]
    with pytest.MonkeyPatch.context() as monkeypatch:
        failing_on(monkeypatch, "blue", RuntimeError("RESOURCE_EXHAUSTED: the blue one failed"))
        assert generate(*batch) == 3
    captured = capsys.readouterr()
    assert f"line 2: '{BLUE}': out of memory (RESOURCE_EXHAUSTED: the blue one failed)" in captured.err
    assert "videos: 2 made, 0 there already, 1 failed" in captured.out and len(names(tmp_path / "out")) == 2
    assert "failed" in {
        entry["state"] for entry in json.loads((tmp_path / "out" / "batch.json").read_text())["videos"].values()
    }
    assert generate(*batch) == 0, "the same command makes what failed"
    assert "videos: 1 made, 2 there already, 0 failed" in capsys.readouterr().out and left_over(tmp_path / "out") == []


def test_latents_that_are_not_finite_fail_alone(tmp_path, capsys, monkeypatch):
    denoise = Pipeline.denoise_batch

    def spoilt(self, conditionings, configs, *, control):
        on_result = control.on_result

        def spoil(found):
            on_result([found[0], replace(found[1], tensors={"latents": found[1].latents * np.nan}), found[2]])

        return denoise(self, conditionings, configs, control=replace(control, on_result=spoil))

    monkeypatch.setattr(Pipeline, "denoise_batch", spoilt)
    code = generate("--prompt", RED, "--num-videos", 3, "--batch-size", 3, "--output-dir", tmp_path)
    assert code == 3 and len(names(tmp_path)) == 2 and "the latents hold NaN or infinity" in capsys.readouterr().err


def test_what_is_wrong_with_the_request_is_2_whatever_is_kept(tmp_path, capsys, monkeypatch):
    def fail(self, latents):
        raise InputError("these latents won't do")

    monkeypatch.setattr(Pipeline, "decode_chunks", fail)
    assert generate("--prompt", RED, "-o", tmp_path / "clip.mp4") == 2
    assert "what is done is kept" in capsys.readouterr().err


def test_what_decoding_fails_with_does_not_lose_the_latents(tmp_path, capsys, calls):
    command = ["--prompt", RED, "-o", tmp_path / "clip.mp4"]
    with pytest.MonkeyPatch.context() as monkeypatch:

        def fail(self, latents):
            raise RuntimeError("RESOURCE_EXHAUSTED: no room")

        monkeypatch.setattr(Pipeline, "decode_chunks", fail)
        assert generate(*command) == 1
    error = capsys.readouterr().err
    assert "out of memory" in error and "what is done is kept; the same command with --resume goes on" in error
    calls["denoise"].clear()
    assert generate(*command, "--resume") == 0 and calls["denoise"] == [] and left_over(tmp_path) == []


def test_a_sweep_encodes_once_and_shows_all(tmp_path, capsys, calls):
    prompt = '<script>alert("x")</script> & a red circle'
    code = generate("--prompt", prompt, "--sweep", "seed=0..1", "guidance_scale=4,5,6", "--output-dir", tmp_path)
    assert code == 0 and calls["encode"] == [prompt] and len(calls["decode"]) == 6
    page = (tmp_path / "index.html").read_text()
    assert "<script>alert" not in page and html.escape(prompt) in page
    assert sorted(re.findall(r'<video src="([^"]+)"', page)) == names(tmp_path)
    assert all(f"seed {seed}, guidance_scale {scale}" in page for seed in (0, 1) for scale in (4.0, 5.0, 6.0))
    with Image.open(tmp_path / "sweep.png") as sheet:
        assert sheet.width > 3 * 256 and sheet.height > 2 * 256
    assert generate("--prompt", prompt, "--sweep", "seed=0..1", "guidance_scale=4,5,6", "--output-dir", tmp_path) == 0
    assert "0 made, 6 there already" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.html").write_text("mine")
    assert generate("--prompt", prompt, "--sweep", "seed=0..1", "--output-dir", tmp_path / "other") == 2
    assert (tmp_path / "other" / "index.html").read_text() == "mine"


def test_a_word_too_many_is_an_error_without_a_sweep(capsys):
    assert generate("--prompt", "x", "seed=1") == 2 and "unexpected extra argument" in capsys.readouterr().err


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    cache = ["--steps", 4, "--cache", "deepcache", "--cache-start-step", 1, "--cache-end-step", 4, "--cache-step-interval", 3]
    assert generate("--prompt", RED, "--negative-prompt", "blurry", "-o", path, *cache) == 0
    return path


def test_the_record_is_in_the_mp4_and_beside_it(clip):
    record, beside = read_metadata(clip), json.loads(clip.with_suffix(".json").read_text())
    assert record == read_record(clip) and beside == read_record(clip.with_suffix(".json"))
    assert beside.pop("video_sha256") == file_sha256(clip)
    assert {n: v for n, v in beside.items() if n != "checksum"} == {n: v for n, v in record.items() if n != "checksum"}
    assert (
        record["prompt"] == RED and record["seed"] == 42 and record["model_id"] == "wan-tiny" and record["cache"] == "deepcache"
    )
    assert len(record["fingerprint"]) == 32 and record["versions"]["jax"] and record["versions"]["tpuvid-tiny"]
    assert record["options"]["dtype"] == "float32" and record["history"]["denoise"]["cache"]["full"] == "0-1"
    assert record["history"]["denoise"]["devices"] and record["history"]["decode"]["seconds"]["decode"] > 0
    assert len(record["latents_sha256"]) == len(record["frames_sha256"]) == 64


def test_metadata_leaves_the_pictures_as_they_are(tmp_path):
    frames = np.random.default_rng(0).random((9, 32, 48, 3), np.float32)
    packets = []
    for metadata in (None, {"prompt": "é\n" * 1000}):
        path = save_mp4(frames, tmp_path / "clip.mp4", fps=8, metadata=metadata, overwrite=True)
        with av.open(str(path)) as container:
            packets.append([bytes(packet) for packet in container.demux(video=0)])
        assert read_metadata(path) == metadata
        assert path.read_bytes().index(b"moov") < path.read_bytes().index(b"mdat"), "the index comes first"
    assert packets[0] == packets[1] and [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_what_is_to_be_left_out_is_left_out(tmp_path, capsys, monkeypatch):
    secret = "a zqxwred circle moving right"
    assert (
        generate("--prompt", secret, "--negative-prompt", secret, "--output-dir", tmp_path / "a", "--no-prompt-in-metadata")
        == 0
    )
    (video,) = (tmp_path / "a").glob("*.mp4")
    assert video.name.startswith("video_42_") and not any(
        b"zqxw" in path.read_bytes() for path in (tmp_path / "a").rglob("*.*")
    )
    frames = ["--save-frames", "--no-prompt-in-metadata", "-o", tmp_path / "frames" / "clip.mp4"]
    assert generate("--prompt", secret, "--negative-prompt", secret, *frames) == 0
    assert {path.suffix for path in (tmp_path / "frames").iterdir()} == {".mp4", ".png", ".json", ".safetensors"}
    assert not any(b"zqxw" in path.read_bytes() for path in (tmp_path / "frames").iterdir())
    monkeypatch.chdir(tmp_path)
    assert generate("--prompt", secret, "--sweep", "seed=1,2", "--no-prompt-in-metadata") == 0
    assert (tmp_path / "outputs" / "video_sweep" / "index.html").exists()
    assert not any(
        "zqxw" in path.name or (path.is_file() and b"zqxw" in path.read_bytes()) for path in Path("outputs").rglob("*")
    )
    assert generate("--prompt", secret, "-o", tmp_path / "b.mp4", "--no-metadata") == 0
    assert read_metadata(tmp_path / "b.mp4") is None and not (tmp_path / "b.json").exists()
    capsys.readouterr()
    assert run(["reproduce", str(video)]) == 2 and "give --prompt" in capsys.readouterr().err
    assert run(["reproduce", str(video), "--prompt", secret, "--negative-prompt", secret]) == 0
    assert "latents: identical, bit for bit" in capsys.readouterr().out
    assert run(["reproduce", str(tmp_path / "b.mp4")]) == 2 and "holds no record" in capsys.readouterr().err


def test_reproducing_gives_the_same_bits(clip, tmp_path, capsys):
    assert run(["reproduce", str(clip), "-o", str(tmp_path / "again.mp4"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["differences"] == [] and found["same_latents"] and found["same_frames"] and found["comparison"]["identical"]
    assert run(["reproduce", str(clip), "-o", str(tmp_path / "again.mp4")]) == 2 and "already exists" in capsys.readouterr().err


def test_reproducing_says_what_differs(clip, tmp_path, capsys):
    record = json.loads(clip.with_suffix(".json").read_text())
    del record["checksum"]
    changed = record | {"versions": record["versions"] | {"jax": "0.0.1"}, "fingerprint": "0" * 32, "seed": 43}
    (tmp_path / "clip.json").write_text(json.dumps(sealed(changed)))
    (tmp_path / "clip.mp4").write_bytes(clip.read_bytes())
    assert run(["reproduce", str(tmp_path / "clip.json")]) == 0
    out = capsys.readouterr().out
    assert "differs: jax: 0.0.1 then" in out and f"differs: weights: {'0' * 32} then, {record['fingerprint']} now" in out
    assert "latents: different" in out and re.search(r"PSNR of the mp4 against the original: \d+\.\d\d dB", out)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda text: text.replace('"seed": 42', '"seed": 43'), "is damaged (its checksum is another)"),
        (lambda text: text.replace('"record_version": 1', '"record_version": 9'), "its record is of version 9"),
        (lambda text: "{}", "holds no record"),
        (lambda text: text[:-20], "is no readable JSON"),
    ],
)
def test_a_damaged_record_is_refused(clip, tmp_path, capsys, change, says):
    (tmp_path / "clip.json").write_text(change(clip.with_suffix(".json").read_text()))
    assert run(["reproduce", str(tmp_path / "clip.json")]) == 2 and says in capsys.readouterr().err


def test_a_strangers_record_is_checked_like_flags(clip, tmp_path, capsys):
    record = json.loads(clip.with_suffix(".json").read_text())
    del record["checksum"]
    for change, says in (
        ({"model_id": "../../nowhere"}, "can't be had here"),
        ({"num_frames": 6}, "num_frames=6"),
        ({"prompt": ["a"]}, "needs a string"),
        ({"seed": -1}, "says no seed"),
        ({"options": []}, "is incomplete"),
        ({"options": {"dtype": "float64"}}, "dtype='float64'"),
        ({"options": {"attention_backend": "evil"}}, "evil"),
        ({"options": {"mesh": "dp=99"}}, "needs 99 devices"),
        ({"options": {"text_encoder_device": "gpu7"}}, "gpu7"),
        ({"loras": [{"path": "/nowhere", "scale": 1.0}]}, "/nowhere: does not exist"),
        ({"loras": [{"path": "/nowhere", "scale": "x"}]}, "lora_scale='x'"),
        ({"loras": [7]}, "is incomplete"),
        ({"loras": [{"path": "a", "scale": 1}, {"path": "b", "scale": 1}]}, "names 2 LoRAs"),
        ({"loras": [{"path": "a\0b", "scale": 1}]}, "is incomplete"),
        ({"versions": [1]}, "is incomplete"),
        ({"history": {"encode": 5}}, "is incomplete"),
        ({"options": {"dtype": [1]}}, "is incomplete"),
        ({"options": {"mesh": 5}}, "is incomplete"),
        ({"guidance_scale": 10**400}, "guidance_scale=1000"),
    ):
        (tmp_path / "clip.json").write_text(json.dumps(sealed(record | change)))
        code = run(["reproduce", "-q", str(tmp_path / "clip.json")])
        error = capsys.readouterr().err
        assert code == 2 and says in error and error.count("\n") == 1, (change, error)


def test_inspecting_a_video_says_how_it_was_made(clip, tmp_path, capsys):
    assert run(["inspect", str(clip)]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{clip}: video" and len(lines) == 5 and lines[0] == f"  prompt: {RED}"
    assert lines[1] == "  model: wan-tiny, 64x64, 5 frames at 8 per second" and lines[2].endswith(
        "4 steps, guidance 4.0, seed 42"
    )
    assert " UTC, on 1 × cpu, in " in lines[3]
    assert lines[4].startswith(f"  again: tpuvid generate --model wan-tiny --prompt '{RED}' --negative-prompt blurry")
    assert "--cache deepcache --cache-start-step 1" in lines[4] and "--height" not in lines[4]
    _, _, *again = shlex.split(lines[4])
    assert run([*again, "-q", "-o", str(tmp_path / "again.mp4")]) == 0
    assert read_record(tmp_path / "again.mp4")["latents_sha256"] == read_record(clip)["latents_sha256"]
    assert run(["inspect", "-v", str(clip)]) == 0
    out = capsys.readouterr().out
    assert "clip.mp4: video, 64x64, 5 frames at 8 per second" in out and f"prompt = {RED}" in out and "jax = " in out
    plain = save_mp4(np.zeros((3, 16, 16, 3), np.float32), tmp_path / "plain.mp4", fps=8)
    assert run(["inspect", str(plain)]) == 0 and "holds no record" in capsys.readouterr().out
    (tmp_path / "no.mp4").write_bytes(b"no")
    assert run(["inspect", str(tmp_path / "no.mp4")]) == 2
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:-100])
    assert run(["inspect", str(tmp_path / "cut.mp4")]) == 1 and "cut.mp4: is truncated" in capsys.readouterr().err


def test_decoding_holds_a_bounded_number_of_frames(tmp_path, monkeypatch):
    """No more than a few of a video's 40 chunks are alive while it is written."""
    pipe = tpuvid.load("wan-tiny")
    seen, most = [], 0

    def chunks(self, latents):
        nonlocal most
        for i in range(40):
            chunk = np.full((1, 4, 64, 64, 3), i / 40, np.float32)
            seen.append(weakref.ref(chunk))
            most = max(most, sum(chunk() is not None for chunk in seen))
            yield {"frames": chunk}

    monkeypatch.setattr(Pipeline, "decode_chunks", chunks)
    config = pipe.spec.configure(prompt="x", num_frames=157)
    latents = Latents(model_id="wan-tiny", tensors={"latents": np.zeros((1, 16, 40, 8, 8), np.float32)}, config=config)
    written = Outputs(video=tmp_path / "clip.mp4", save_frames=True).write(pipe, latents)
    assert written.frames == 160 and most <= 3
    file = read_stage_file(tmp_path / "stage3_frames.safetensors")
    assert (
        file.checked
        and file.tensors["frames"].shape == (1, 160, 64, 64, 3)
        and file.tensors["frames"][0, 159, 0, 0, 0] == 39 / 40
    )


def started(*arguments, steps=40):
    """A generation in a process of its own, which says its steps and takes a while for each."""
    slow = (
        "import time, tpuvid.runs.follower as f\n"
        "after = f.Follower._after_step\n"
        "def slow(self, at):\n"
        "    print(at.done, flush=True); time.sleep(0.2); after(self, at)\n"
        "f.Follower._after_step = slow\n"
    )
    settings = ("--model", "wan-tiny", "--prompt", RED, "--num-frames", "5", "--steps", str(steps))
    return Forked(("generate", *settings, *map(str, arguments)), code=slow + COMMAND)


def until_step(process, step):
    if str(step) not in process.lines():
        raise AssertionError(f"it never came to step {step}: {process.communicate()[1]}")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_go_on(tmp_path, number, code):
    process = started("--output-dir", tmp_path, "--seed", -1, steps=8)
    until_step(process, 3)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and "finishing this step, then saving" in err and "Traceback" not in err
    assert re.search(r"stopped after step [345] of 8; what is done is kept; the same command with --resume goes on", err)
    assert list((tmp_path / ".tpuvid").rglob("denoising-*"))
    settings = ["--model", "wan-tiny", "--prompt", RED, "--num-frames", "5", "--steps", "8"]
    assert run(["generate", *settings, "--output-dir", str(tmp_path), "--seed", "-1", "--resume"]) == 0
    (one,) = tmp_path.glob("*.mp4")
    record = read_record(one)
    assert record["history"]["denoise"]["resumed"] and left_over(tmp_path) == []
    assert run(["generate", *settings, "--output-dir", str(tmp_path / "whole"), "--seed", str(record["seed"])]) == 0
    (two,) = (tmp_path / "whole").glob("*.mp4")
    assert record["latents_sha256"] == read_record(two)["latents_sha256"]


def test_a_second_interrupt_stops_at_once(tmp_path):
    process = started("--output-dir", tmp_path)
    until_step(process, 2)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    begin = time.time()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and time.time() - begin < 10 and "Traceback" not in err


def test_two_processes_with_one_output_do_not_meet(tmp_path, capsys):
    process = started("-o", tmp_path / "clip.mp4")
    try:
        until_step(process, 1)
        assert generate("--prompt", BLUE, "-o", tmp_path / "clip.mp4") == 2
        error = capsys.readouterr().err
        assert f"clip.mp4: process {process.pid} on" in error and "is at work on it" in error
    finally:
        process.kill()
        process.communicate()
    assert generate("--prompt", BLUE, "-o", tmp_path / "clip.mp4") == 0, "a killed process leaves no lock"


def test_resuming_what_is_done_finds_it_by_its_content(tmp_path, capsys):
    command = ["--prompt", RED, "-o", tmp_path / "clip.mp4", "--resume"]
    assert generate(*command) == 0 and generate(*command) == 0
    assert "clip.mp4 (there already)" in capsys.readouterr().out
    data = bytearray((tmp_path / "clip.mp4").read_bytes())
    data[-1] ^= 1
    (tmp_path / "clip.mp4").write_bytes(data)
    assert generate(*command) == 2 and "already exists" in capsys.readouterr().err


def test_files_of_others_stay(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TPUVID_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "p.txt").write_text(f"{RED}\n")
    for name in ("preview.png", "batch.preview.png", "clip.preview.png"):
        (tmp_path / name).write_text("mine")
    assert generate("--prompts", tmp_path / "p.txt", "--output-dir", tmp_path) == 0
    assert generate("--prompt", BLUE, "-o", tmp_path / "clip.mp4") == 0
    assert all((tmp_path / name).read_text() == "mine" for name in ("preview.png", "batch.preview.png", "clip.preview.png"))
    assert generate("--prompt", BLUE, "-o", tmp_path / "clip.mp4", "--preview", 1, "--overwrite") == 0
    assert not (tmp_path / "clip.preview.png").exists()
    (tmp_path / "other.preview.png").write_text("mine")
    assert generate("--prompt", BLUE, "-o", tmp_path / "other.mp4", "--preview", 1) == 2
    assert "other.preview.png: already exists" in capsys.readouterr().err


def test_adding_prompts_remakes_nothing(tmp_path, capsys):
    long = "a red circle growing on a black background that is very dark indeed"
    (tmp_path / "p.txt").write_text(f"{long}\n")
    batch = ["--prompts", tmp_path / "p.txt", "--output-dir", tmp_path / "out"]
    assert generate(*batch) == 0
    (tmp_path / "p.txt").write_text(f"{long} today\n{long}\n")
    assert generate(*batch) == 0 and "videos: 1 made, 1 there already" in capsys.readouterr().out
    assert len(names(tmp_path / "out")) == 2


def test_latents_for_which_there_is_no_room_keep_their_savepoints(tmp_path, monkeypatch, capsys):
    from tpuvid.errors import TpuvidError
    from tpuvid.runs.kept.work import Work

    batch = [
        "--prompt",
        RED,
        "--num-videos",
        2,
        "--batch-size",
        2,
        "--output-dir",
        tmp_path,
        "--savepoint-every",
        1,
        "--steps",
        3,
    ]
    with monkeypatch.context() as context:

        def full(self, config, latents):
            raise TpuvidError("no space left")

        context.setattr(Work, "save_latents", full)
        assert generate(*batch) == 3
    assert list((tmp_path / ".tpuvid" / "batch").glob("denoising-*"))
    assert generate(*batch) == 0
    assert all(json.loads(p.read_text())["history"]["denoise"]["resumed"] for p in tmp_path.glob("*_4[23].json"))


@pytest.mark.parametrize("pad", range(0, 16))
def test_a_header_of_any_length_is_read(tmp_path, pad):
    """One of 640, 896, 1152 or 1408 bytes begins as a pickle does."""
    from tpuvid.files.stage_files import write_tensors

    for length in range(400, 1500, 16):
        path = tmp_path / "x.safetensors"
        write_tensors(path, {"a": np.zeros(1, np.float32)}, {"text": "x" * (length + pad)}, overwrite=True)
        assert read_stage_file(path).checked
