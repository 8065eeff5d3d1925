"""``--no-prompt-in-metadata``: the prompts are in no file, neither of a run that is done nor of one that was stopped."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from shared.pipes import kept
from tpuvid.cli.main import run
from tpuvid.files.mp4 import read_metadata
from tpuvid.files.stage_files import EMBEDDINGS, LATENTS, read_stage_file
from tpuvid.runs.follower import Follower
from tpuvid.runs.pipeline import Pipeline

SECRET = "a zqxwred circle moving right"
PROMPTS = ["--prompt", SECRET, "--negative-prompt", "no zqxwblue, please"]
QUICK = ["--steps", "3", "--num-frames", "5"]
PRIVATE, EVERY = "--no-prompt-in-metadata", ["--savepoint-every", "1", "--preview", "1"]


@pytest.fixture(autouse=True)
def open_pipes(monkeypatch):
    monkeypatch.setattr("tpuvid.load", kept)


def tpuvid(*arguments):
    return run([*map(str, arguments)])


def generate(*arguments):
    return tpuvid("generate", "--model", "wan-tiny", *QUICK, PRIVATE, *arguments)


def written(folder):
    """The kinds of files in it, none of which says the prompts; of pictures, also in texts that are packed."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    for path in files:
        said = str(path.relative_to(folder)).encode() + path.read_bytes()
        if path.suffix == ".png":
            said += repr(Image.open(path).info).encode()
        assert b"zqxw" not in said, path
    return {path.name.partition("-")[0] if path.name.startswith("denoising-") else path.name for path in files}


@contextmanager
def stopped_after(step):
    """Runs end there, with what they have kept by then."""
    after = Follower._after_step

    def stop(self, at):
        after(self, at)
        if at.done == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as context:
        context.setattr(Follower, "_after_step", stop)
        yield


def test_a_video_that_is_stopped_and_gone_on_with(tmp_path):
    command = [*PROMPTS, "-o", tmp_path / "clip.mp4", "--save-frames", *EVERY]
    with stopped_after(2):
        assert generate(*command) == 130
    found = written(tmp_path)
    assert {"denoising", EMBEDDINGS, "generation_config.json", "begun.json", "clip.preview.png"} <= found
    assert generate(*command, "--resume") == 0
    assert written(tmp_path) == {"clip.mp4", "clip.png", "clip.json", "stage3_frames.safetensors"}
    record = read_metadata(tmp_path / "clip.mp4")
    assert record["history"]["denoise"]["resumed"] == "after step 2" and "prompt" not in record
    assert tpuvid("reproduce", tmp_path / "clip.mp4", *PROMPTS) == 0, "the prompts are what is asked for"
    written(tmp_path)


@pytest.mark.parametrize("first, second", [([PRIVATE], []), ([], [PRIVATE])], ids=["private first", "private then"])
def test_either_kind_of_run_goes_on_with_the_steps_of_the_other(tmp_path, first, second):
    """What a run may say is no part of what it computes."""
    command = ["generate", "--model", "wan-tiny", *QUICK, *PROMPTS, "-o", tmp_path / "clip.mp4", *EVERY]
    with stopped_after(2):
        assert tpuvid(*command, *first) == 130
    assert tpuvid(*command, *second, "--resume") == 0
    record = read_metadata(tmp_path / "clip.mp4")
    assert record["history"]["denoise"]["resumed"] == "after step 2"
    assert record.get("prompt") == (None if second else SECRET)
    if second:
        written(tmp_path)


def test_a_batch_with_a_failure_that_quotes_its_prompt(tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text(f"{SECRET}\n{SECRET}, slowly\n")
    folder = tmp_path / "out"
    command = ["--prompts", tmp_path / "prompts.txt", "--output-dir", folder, *EVERY]
    decode = Pipeline.decode_chunks

    def fail(self, latents):
        if latents.config.prompt == SECRET:
            raise RuntimeError(f"can't show {latents.config.prompt!r}")
        return decode(self, latents)

    with monkeypatch.context() as context:
        context.setattr(Pipeline, "decode_chunks", fail)
        assert generate(*command) == 3 and f"can't show '{SECRET}'" in capsys.readouterr().err
    assert {"batch.json", EMBEDDINGS, LATENTS, "generation_config.json"} <= written(folder)
    assert [e["state"] for e in json.loads((folder / "batch.json").read_text())["videos"].values()] == ["failed", "done"]
    assert generate(*command) == 0
    assert "1 made, 1 there already" in capsys.readouterr().out and {p.suffix for p in folder.iterdir()} == {
        ".mp4", ".png", ".json"
    }  # fmt: skip
    written(folder)


def test_a_sweep(tmp_path):
    assert generate(*PROMPTS, "--sweep", "seed=1,2", "--output-dir", tmp_path) == 0
    assert {"index.html", "sweep.png", "batch.json"} <= written(tmp_path)


@pytest.mark.parametrize("begins", ["encode", "denoise"])
def test_stage_by_stage(tmp_path, begins):
    """Once a stage leaves the prompts out, those after it know none to leave out."""
    first, then = tmp_path / "first", tmp_path / "then"
    assert tpuvid("encode", "--model", "wan-tiny", *PROMPTS, "--output-dir", first, *[PRIVATE] * (begins == "encode")) == 0
    if begins == "encode":
        assert written(first) == {EMBEDDINGS, "generation_config.json"}
    command = ["denoise", "--input-dir", first, "--output-dir", then, *QUICK, *EVERY, *[PRIVATE] * (begins == "denoise")]
    with stopped_after(2):
        assert tpuvid(*command) == 130
    assert "denoising" in written(then)
    assert tpuvid(*command, "--resume") == 0
    assert read_stage_file(then / LATENTS).history["denoise"]["resumed"] == "after step 2"
    assert tpuvid("decode", "--input-dir", then, "--save-frames") == 0
    assert {LATENTS, "generation_config.json", "output_video.mp4", "stage3_frames.safetensors"} <= written(then)
    assert "prompt" not in read_metadata(then / "output_video.mp4")
    hashes = [read_stage_file(then / name).prompts_sha256 for name in (LATENTS, "stage3_frames.safetensors")]
    assert len(set(hashes)) == 1 and len(hashes[0]) == 64
    assert tpuvid("reproduce", then / "output_video.mp4") == 2, "without a prompt there is nothing to make"
    assert tpuvid("reproduce", then / "output_video.mp4", *PROMPTS) == 0
    written(then)
