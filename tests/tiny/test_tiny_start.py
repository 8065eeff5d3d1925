"""A command whose model has run before starts with what it needs and no more."""

import subprocess
import sys

COMMAND = [
    *("generate", "--model", "wan-tiny", "--prompt", "a red circle growing on a black background"),
    *("--num-frames", "5", "--steps", "2", "--overwrite", "-o"),
]
HEAVY = ("diffusers", "torchax", "transformers", "scipy", "torch._dynamo", "accelerate")


def test_a_warm_start_builds_and_traces_nothing(tmp_path, python_env):
    """Twice, with a cache of their own; the second is the first one's video, bit for bit."""
    script = (
        "import sys, json; from tpuvid.cli.main import run; code = run(sys.argv[1:]);"
        f"print(json.dumps([m for m in {HEAVY!r} if m in sys.modules])); sys.exit(code)"
    )
    found = []
    for name in ("first.mp4", "second.mp4"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script, *COMMAND, str(tmp_path / name)],
            env=python_env | {"TPUVID_CACHE_DIR": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.splitlines()[-1])
    assert "diffusers" in found[0] and found[1] == "[]"

    from tpuvid.runs.kept.record import read_record

    first, second = (read_record(tmp_path / name) for name in ("first.mp4", "second.mp4"))
    assert first["frames_sha256"] == second["frames_sha256"]
    assert not any(part.startswith("compile") for stage in second["history"].values() for part in stage["seconds"])
