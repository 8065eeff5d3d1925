import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tpuvid.cli.main import run
from tpuvid.errors import InputError
from tpuvid.plugin.registry import registry

LIGHT = ("jax", "torch", "torchax", "diffusers", "transformers")
"""What must not be imported to answer a question about arguments."""


def ask(*questions):
    """Run command lines in a fresh interpreter; of each (exit code, stdout, stderr, the heavy modules by then)."""
    script = (
        "import contextlib, io, json, sys; from tpuvid.cli.main import run\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    out, err = io.StringIO(), io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = run(arguments)\n"
        f"    heavy = [m for m in {LIGHT!r} if m in sys.modules]\n"
        "    print(json.dumps([code, out.getvalue(), err.getvalue(), heavy]))"
    )
    command = [sys.executable, "-c", script, json.dumps(questions)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


QUESTIONS = [
    (["list-models"], 0, "wan2.1-t2v-14b"),
    (["list-models", "--json"], 0, '"wan-tiny"'),
    (["--help"], 0, "list-models"),
    (["generate", "--help"], 0, "--guidance-scale"),
    ([], 0, "Usage"),
    (["--version"], 0, "0.1.0"),
    (["generate"], 2, "Missing option '--model'"),
    (["generat"], 2, "No such command"),
    (["generate", "--model", "wan2.1-t2v-14", "--prompt", "x"], 2, "did you mean wan2.1-t2v-14b"),
    (["generate", "--model", "./nowhere", "--prompt", "x"], 2, "does not exist"),
    (["generate", "--model", "wan-tiny"], 2, "give either --prompt or --prompts"),
    (["generate", "--model", "wan-tiny", "--prompt", "x", "--num-frames", "80"], 2, "nearest: 77 and 81"),
    (["generate", "--model", "wan-tiny", "--prompt", "x", "--height", "100"], 2, "nearest: 96 and 112"),
    (["generate", "--model", "wan-tiny", "--prompt", "x", "--steps", "-4"], 2, "num_inference_steps=-4: needs"),
    (["generate", "--model", "wan-tiny", "--prompt", "x", "--guidance_scale", "nan"], 2, "guidance_scale=nan: needs"),
    (["generate", "--model", "wan-tiny", "--prompt", "x", "--seed", "-5"], 2, "seed=-5: needs"),
    (["generate", "--model", "wan-tiny", "--prompt", "x", "--fps", "abc"], 2, "'abc' is not a valid integer"),
    (["generate", "--model", "wan-tiny", "--prompt", "x", "--dtype", "int4"], 2, "bfloat16"),
    (["generate", "--model", "wan-tiny", "--prompt", "x", "-o", "clip.avi"], 2, "give a name that ends so"),
    (["generate", "--model", "wan-tiny", "--prompt-file", "/nonexistent"], 2, "needs a text file of prompts"),
    (["generate", "--model", "wan-tiny", "--prompt", "x", "-o", "a.mp4", "--output-dir", "b"], 2, "give either --output"),
    (["generate", "--model", "wan-tiny", "--prompt", "x", "-o", "x" * 300 + ".mp4"], 2, "choose a shorter one"),
    (["generate", "--model", "", "--prompt", "x"], 2, "model is empty"),
    (["encode", "--model", "wan-tiny"], 2, "Missing option '--prompt'"),
    (["denoise", "--input-dir", "/nonexistent"], 2, "does not exist"),
    (["decode", "--input-dir", "/nonexistent"], 2, "does not exist"),
    (["inspect", "/nonexistent"], 2, "does not exist"),
    (["generate", "--help"], 0, "--vae-tiling"),
    (["decode", "--help"], 0, "--vae-tiling"),
    (["denoise", "--vae-tiling"], 2, "No such option"),
    (["compile", "--help"], 0, "--topology"),
    (["compile", "--model", "wan-tiny", "--topology", "v9-8", "-o", "a.pack"], 2, "is no TPU slice"),
    (["compile", "--model", "wan-tiny", "--topology", "cpu", "--height", "33", "-o", "a.pack"], 2, "nearest: 32 and 48"),
    (["generate", "--model", "wan-tiny", "--prompt", "x", "--pack", "/nonexistent"], 2, "does not exist"),
    (["generate", "--model", "wan-tiny", "--prompt", "x", "--trust-pack"], 2, "add --pack, or leave out --trust-pack"),
    (["compare", "--help"], 0, "PSNR, SSIM"),
    (["tune", "attention", "--help"], 0, "--max-candidates"),
    (["tune", "attention", "--topology", "v6e-8"], 2, "give --model, or a whole shape"),
    (["tune", "attention", "--topology", "v6e-8", "--heads", "4"], 2, "--queries, --keys, --head-dim missing"),
    (["tune", "attention", "--topology", "v6e-8", "--model", "wan-tiny", "--heads", "2"], 2, "brings its shapes"),
    (["tune", "attention", "--topology", "v6e-3", "--model", "wan-tiny"], 2, "v6e comes as"),
    (["tune", "attention", "--topology", "v5e-8", "--model", "wan-tiny"], 2, "no times for v5e"),
    (["compare", "a.mp4"], 2, "Missing argument 'B'"),
    (["compare", "/nonexistent.mp4", "/nonexistent.mp4"], 2, "does not exist"),
]


@pytest.fixture(scope="module")
def answers():
    return ask(*(arguments for arguments, _, _ in QUESTIONS))


@pytest.mark.parametrize("number", range(len(QUESTIONS)), ids=lambda number: " ".join(QUESTIONS[number][0])[:80] or "nothing")
def test_questions_are_answered_without_anything_heavy(answers, number):
    """In one process, so that what one imports is there after it too: the first that fails is the one to blame."""
    _, code, says = QUESTIONS[number]
    found, out, err, heavy = answers[number]
    assert found == code
    assert says in (out if code == 0 else err)
    assert heavy == []
    if code:
        assert err.startswith("tpuvid: error: ") and err.count("\n") == 1, "an error is one line"


def test_comparing_imports_nothing_heavy(tmp_path):
    from tpuvid.files.mp4 import save_mp4
    from tpuvid.files.stage_files import save_frames

    frames = np.random.default_rng(0).random((1, 3, 16, 24, 3), np.float32)
    save_frames(tmp_path / "a", frames, {}, overwrite=False)
    save_mp4(frames[0], tmp_path / "b" / "clip.mp4", fps=8)
    ((code, out, err, heavy),) = ask(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert code == 0 and "SSIM" in out and err == "" and heavy == []


def test_list_models_is_quick(tpuvid_command):
    """Under 0.5 s of CPU, whatever else this machine is doing; the best of five."""

    def seconds():
        before = os.times()
        subprocess.run([tpuvid_command, "list-models"], check=True, capture_output=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(5)) < 0.5


def test_list_models_shows_a_broken_plugin(tmp_path, tpuvid_command, python_env):
    """A distribution whose module does not exist: one warned row, exit code 0."""
    info = tmp_path / "broken_one-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-one\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tpuvid]\nbroken = broken_one.plugin\n")
    done = subprocess.run(
        [tpuvid_command, "list-models"], env=python_env | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "wan-tiny" in done.stdout
    assert (
        done.stderr
        == "warning: plugin broken (broken-one 1.0) does not load: ModuleNotFoundError: No module named 'broken_one'\n"
    )
    denied = subprocess.run(
        [tpuvid_command, "list-models"],
        env=python_env | {"PYTHONPATH": str(tmp_path), "TPUVID_PLUGINS": "-broken"},
        capture_output=True,
        text=True,
    )
    assert denied.stderr == ""


def fails(capsys, *arguments):
    code = run(list(arguments))
    return code, capsys.readouterr().err


def test_yaml_gives_defaults_and_flags_win(tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text("model: wan-tiny\nprompt: x\nnum-frames: 80\nheight: 100\n")
    assert "height=100" in fails(capsys, "generate", "--config", str(config))[1]
    assert "num_frames=80" in fails(capsys, "generate", "--config", str(config), "--height", "64")[1]
    assert "num_frames=82" in fails(capsys, "generate", "--num_frames", "82", "--height", "64", "--config", str(config))[1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("num_framez: 3", "'num_framez' is no flag of tpuvid; did you mean num-frames?"),
        ("- a", "holds a list"),
        ("a: [", "no readable YAML"),
        ("output: [x]", "output=['x']: needs one path"),
        ("model: a\nprompt: x\nseed: true", "'true' is not a valid integer"),
        ("seed: 1\nseed: 2", "gives 'seed' twice; say it once"),
        ("steps: 1\nnum_inference_steps: 2", "num_inference_steps is another name of what stands there already"),
        ("prompt: &a [*a]", "a value that holds itself"),
        ("prompt: {a: b}", "needs one text"),
    ],
)
def test_yaml_that_makes_no_sense_is_refused(tmp_path, capsys, text, message):
    (tmp_path / "c.yaml").write_text(text)
    code, err = fails(capsys, "generate", "--config", str(tmp_path / "c.yaml"))
    assert code == 2 and message in err and err.count("\n") == 1


def test_yaml_values_have_the_flags_types(tmp_path, capsys):
    for name in ("steps", "num_inference_steps", "num-inference-steps"):
        for value in ("many", "1.9"):
            (tmp_path / "c.yaml").write_text(f"model: wan-tiny\nprompt: x\n{name}: {value}\n")
            assert f"'{value}' is not a valid integer" in fails(capsys, "generate", "--config", str(tmp_path / "c.yaml"))[1]


def test_yaml_is_read_as_it_is_written(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr("tpuvid.runs.asked.requests.plan_generation", lambda model, **asked: seen.update(asked) or 1 / 0)
    text = 'model: wan-tiny\nprompt: 12:30\nseed: 010\nnegative_prompt: no\noverwrite: true\nsweep: ["fps=8,12"]\n'
    text += "output_dir: ~/x\n"
    (tmp_path / "c.yaml").write_text(text)
    assert run(["generate", "--config", str(tmp_path / "c.yaml")]) == 1
    assert (seen["prompt"], seen["settings"]["seed"], seen["settings"]["negative_prompt"]) == ("12:30", 10, "no")
    assert seen["sweep"] == ("fps=8,12",) and seen["keeping"].overwrite and seen["keeping"].output_dir == Path.home() / "x"


@pytest.mark.parametrize(
    "given, says",
    [
        (["--seed", "1", "--seed", "2"], "Option '--seed' is given 2 times; give it once."),
        (["--lora-path", "a", "--lora-path", "b"], "Option '--lora-path' is given 2 times"),
        (["--steps", "1", "--num-inference-steps", "2"], "Option '--num-inference-steps' is given 2 times"),
        (
            ["--lora-scale", "0.5"],
            "lora_scale=0.5: means nothing without lora_path; add --lora-path",
        ),
        (["--image", "a.png"], "No such option '--image'. There is none: tpuvid makes videos of text alone."),
        (["--sample_steps", "4"], "No such option '--sample-steps'. Here it is --num-inference-steps."),
        (["--frames", "80"], "num_frames=80"),
        (["--cfg-scale", "-1"], "guidance_scale=-1.0"),
        (["--shift", "0"], "flow_shift=0.0"),
    ],
)
def test_what_is_said_twice_or_alone_or_otherwise(capsys, given, says):
    code, err = fails(capsys, "generate", "--model-path", "wan-tiny", "--prompt", "x", *given)
    assert code == 2 and says in err


@pytest.mark.parametrize("prompt", ["", "  "])
@pytest.mark.parametrize("command", ["generate", "encode"])
def test_no_prompt_is_refused(capsys, command, prompt):
    code, err = fails(capsys, command, "--model", "wan-tiny", "--prompt", prompt)
    assert code == 2 and "needs words that say what the video shows" in err


@pytest.mark.parametrize("name", ["savepoint", "checkpoint"])  # the old name too
def test_either_name_of_savepoints_is_taken(tmp_path, capsys, name):
    (tmp_path / "c.yaml").write_text(f"model: wan-tiny\nprompt: x\n{name}_every: 0\n")
    for given in (["--config", str(tmp_path / "c.yaml")], ["--model", "wan-tiny", "--prompt", "x", f"--{name}-every", "0"]):
        code, err = fails(capsys, "generate", *given)
        assert code == 2 and "0 is not in the range x>=1" in err


def test_one_yaml_serves_all_commands(tmp_path, capsys):
    """What a command doesn't have is another's; an empty value is not given."""
    (tmp_path / "c.yaml").write_text(
        f"model: ./nowhere\nprompt: x\nheight: 64\nlora-path:\ninput_dir: {tmp_path}\noverwrite: true\n"
    )
    assert "'./nowhere' does not exist" in fails(capsys, "encode", "--config", str(tmp_path / "c.yaml"))[1]
    assert "stage1_embeddings.safetensors: does not exist" in fails(capsys, "denoise", "--config", str(tmp_path / "c.yaml"))[1]


def test_an_output_that_exists_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tpuvid.load", lambda *a, **k: pytest.fail("the model was loaded"))
    for existing in ("clip.mp4", "clip.png", "clip.json"):
        (tmp_path / existing).write_text("old")
        code, err = fails(capsys, "generate", "--model", "wan-tiny", "--prompt", "x", "-o", str(tmp_path / "clip.mp4"))
        assert code == 2 and f"{existing}: already exists" in err and "--overwrite" in err
        (tmp_path / existing).unlink()


def test_prompt_file_and_single_outputs_do_not_mix(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a\n\nb\n")
    base = ["generate", "--model", "wan-tiny", "--prompt-file", str(tmp_path / "p.txt")]
    assert "2 videos are asked for; use --output-dir" in fails(capsys, *base, "-o", "x.mp4")[1]
    assert "2 videos are asked for; make them one by one" in fails(capsys, *base, "--save-frames")[1]
    (tmp_path / "p.txt").write_text("\n")
    assert "holds no prompt" in fails(capsys, *base)[1]


def test_a_stage_file_of_another_model_is_refused_before_anything_is_fetched(tmp_path, capsys, monkeypatch):
    from tpuvid.contract.values import Conditioning, Latents
    from tpuvid.files.stage_files import save_conditioning, save_latents

    def fetch(*args):
        raise AssertionError("something was fetched")

    monkeypatch.setattr("tpuvid.files.checkpoint.download", fetch)
    embeds = np.zeros((1, 4, 128), np.float32)
    made = dict(model_id="wan-tiny", fingerprint="abc")
    conditioning = Conditioning(prompt="", negative_prompt="", max_sequence_length=4, tensors={"prompt_embeds": embeds}, **made)
    save_conditioning(tmp_path, conditioning, overwrite=False)
    config = registry().get("wan-tiny").configure()
    tensors = {"latents": np.zeros((1, 16, 1, 4, 4), np.float32)}
    save_latents(tmp_path, Latents(tensors=tensors, config=config, **made), overwrite=False)
    for command, what in (("denoise", "embeddings"), ("decode", "latents")):
        code, err = fails(
            capsys, command, "--model", "wan2.1-t2v-14b", "--input-dir", str(tmp_path), "--output-dir", str(tmp_path / "out")
        )
        assert code == 2 and f"these {what} were made by wan-tiny, which is another checkpoint than wan2.1-t2v-14b" in err


def test_an_interrupt_is_130(monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("tpuvid.load", interrupt)
    code, err = fails(capsys, "generate", "--model", "wan-tiny", "--prompt", "x", "-o", "never.mp4")
    assert code == 130 and "interrupted" in err


@pytest.mark.parametrize(
    "error, says",
    [(RuntimeError("RESOURCE_EXHAUSTED: 9 GB"), "out of memory"), (KeyError("x"), "unexpected; TPUVID_DEBUG=1 shows")],
)
def test_a_failure_while_running_is_one_line_and_1(monkeypatch, capsys, error, says):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("tpuvid.load", fail)
    code, err = fails(capsys, "generate", "--model", "wan-tiny", "--prompt", "x", "-o", "never.mp4")
    told, line = err.splitlines()
    assert code == 1 and says in line and told == "start …"


@pytest.mark.parametrize(
    "option, message",
    [
        (["--mesh", "ep=2"], "dp=2,sp=4"),
        (["--mesh", "tp=64"], "needs 64 devices"),
        (["--attention-backend", "splash"], "runs on tpu"),
    ],
)
def test_what_these_devices_cannot_do_is_refused(tmp_path, capsys, option, message):
    code, err = fails(capsys, "generate", "-q", "--model", "wan-tiny", "--prompt", "x", "-o", str(tmp_path / "a.mp4"), *option)
    assert code == 2 and message in err and err.count("\n") == 1


def test_names_of_our_commands_are_known_to_those_who_check_plugins():
    from tpuvid.cli.main import cli
    from tpuvid.plugin.checks import OWN_COMMANDS

    assert sorted(cli.commands) == list(OWN_COMMANDS)


def test_a_folder_of_profiles_takes_another(tmp_path):
    from tpuvid.cli.options import _usable_folder

    (tmp_path / "prof" / "1").mkdir(parents=True)
    assert _usable_folder(None, None, tmp_path / "prof") == tmp_path / "prof"
    assert _usable_folder(None, None, tmp_path / "new") == tmp_path / "new" and not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file, not a folder"):
        _usable_folder(None, None, tmp_path / "file")


@pytest.mark.parametrize("line", [["-q", "list-models"], ["list-models", "--quiet"], ["-v", "list-models", "-q"]])
def test_how_much_is_said_is_said_anywhere(line, capsys):
    assert run(line) == 0 and "wan-tiny" in capsys.readouterr().out
