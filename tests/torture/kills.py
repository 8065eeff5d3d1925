"""kill -9 at random points of generate, denoise, decode and a batch, and the same command again until it is done."""

import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tpuvid.contract.digests import tensors_digest
from tpuvid.files.stage_files import LATENTS, read_stage_file
from tpuvid.runs.kept.record import read_record

from torture.audit import check_folder, check_silence, left_over
from torture.children import run

PROMPTS = ["a red circle growing on a black background", "a blue square growing on a white background", "a green triangle"]
MOST_KILLS = 4
"""The kills of one job, before it may end."""


@dataclass
class Scenario:
    """A command that writes to `folder`; `prepare` puts there what it reads."""

    name: str
    arguments: Callable[[Path], list[str]]
    prepare: Callable[[Path], None] = lambda folder: folder.mkdir()
    marks: tuple[str, ...] = ()
    """Files whose coming and going are moments of interest."""
    expected: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def scenarios(work: Path) -> list[Scenario]:
    """Each with the result and the time of a run that nobody disturbs."""
    common = ["--model", "wan-tiny"]
    quick = ["--num-frames", "5", "--savepoint-every", "2"]
    (work / "prompts.txt").write_text("\n".join(PROMPTS))
    stages = work / "stages"
    for command in (
        ["encode", *common, "--prompt", PROMPTS[0], "--output-dir", str(stages)],
        ["denoise", "--input-dir", str(stages), "--num-frames", "5", "--steps", "12"],
    ):
        outcome = run(command, work)
        assert outcome.code == 0, outcome.err

    def copied(*names: str) -> Callable[[Path], None]:
        def copy(folder: Path) -> None:
            folder.mkdir()
            for name in names:
                shutil.copy(stages / name, folder)

        return copy

    found = [
        Scenario(
            "generate",
            lambda f: ["generate", *common, *quick, "--prompt", PROMPTS[0], "--steps", "12", "--resume",
                       "-o", str(f / "clip.mp4")],
            marks=(".tpuvid/*/latents-*/*", ".tpuvid/*/denoising-*", ".tpuvid-*", "*.json"),
        ),
        Scenario(
            "batch",
            lambda f: ["generate", *common, *quick, "--prompts", str(work / "prompts.txt"), "--steps", "6", "--batch-size", "2",
                       "--output-dir", str(f)],
            marks=("*.mp4", ".tpuvid/*/latents-*/*", ".tpuvid/*/denoising-*", ".tpuvid-*", "batch.json"),
        ),
        Scenario(
            "denoise",
            lambda f: ["denoise", *quick, "--input-dir", str(f), "--steps", "12", "--resume", "--overwrite"],
            copied("stage1_embeddings.safetensors"),
            (".tpuvid/denoising-*", LATENTS, ".tpuvid-*"),
        ),
        Scenario(
            "decode",
            lambda f: ["decode", "--input-dir", str(f), "--save-frames", "--overwrite"],
            copied(LATENTS),
            (".tpuvid-*", "*.json", "stage3_*"),
        ),
    ]  # fmt: skip
    for scenario in found:
        folder = work / f"{scenario.name}-undisturbed"
        scenario.prepare(folder)
        for _ in range(2):  # the second compiles nothing
            shutil.rmtree(folder)
            scenario.prepare(folder)
            outcome = run(scenario.arguments(folder), work)
            assert outcome.code == 0, outcome.err
        scenario.expected, scenario.seconds = results(folder), outcome.seconds
        shutil.rmtree(folder)
    return found


def results(folder: Path) -> dict[str, str]:
    """Hashes of latents and frames, by name of the file that holds or records them."""
    found = {path.name: read_record(path) for path in folder.glob("*.mp4")}
    hashes = {name: f"{record['latents_sha256']} {record['frames_sha256']}" for name, record in found.items()}
    for path in folder.glob("stage[23]_*.safetensors"):
        hashes[path.name] = tensors_digest(read_stage_file(path).tensors)
    return hashes


def torture(work: Path, found: Sequence[Scenario], kills: int, rng: random.Random) -> Counter:
    """So many kills, over all scenarios in turn; returns the counts."""
    counts: Counter = Counter()
    job = 0
    while sum(counts[scenario.name] for scenario in found) < kills:
        scenario = found[job % len(found)]
        folder = work / f"{scenario.name}-{job}"
        job += 1
        scenario.prepare(folder)
        finished: dict[Path, str] = {}
        for attempt in range(MOST_KILLS + 1):
            until = (lambda seconds: False) if attempt == MOST_KILLS else moment(scenario, folder, rng)
            outcome = run(scenario.arguments(folder), work, until=until)
            check_silence(outcome.err)
            check_folder(folder, finished)
            if outcome.code is not None:
                break
            counts[scenario.name] += 1
            if "--overwrite" in scenario.arguments(folder):
                finished.clear()
        assert outcome.code == 0, outcome.err
        assert results(folder) == scenario.expected, f"{scenario.name}: another result than undisturbed"
        assert not (rest := left_over(folder)), f"{scenario.name}: left over: {rest}"
        counts["jobs"] += 1
        counts["resumed"] += attempt > 0
        shutil.rmtree(folder)
    return counts


def moment(scenario: Scenario, folder: Path, rng: random.Random) -> Callable[[float], bool]:
    """When to kill: at any time, or just after a file of interest has come or gone."""
    if rng.random() < 0.4:
        at = rng.uniform(0, 1.1 * scenario.seconds)
        return lambda seconds: seconds > at
    mark, delay, changes = rng.choice(scenario.marks), rng.uniform(0, 0.05), rng.randint(1, 4)
    seen, since = set(folder.glob(mark)), None

    def until(seconds: float) -> bool:
        nonlocal seen, since, changes
        now = set(folder.glob(mark))
        if now != seen:
            seen, changes = now, changes - 1
            if changes == 0:
                since = seconds
        return since is not None and seconds >= since + delay

    return until
