"""Flipped bits and truncations of every kind of file: each is either refused, or what is read is what was written."""

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tpuvid.cli.main import run as tpuvid
from tpuvid.compute.packs.pack import read_pack
from tpuvid.errors import InputError, TpuvidError
from tpuvid.files.checkpoint import Checkpoint
from tpuvid.files.readers import read_json
from tpuvid.files.stage_files import EMBEDDINGS, FRAMES, LATENTS, load_conditioning, load_latents, read_config, read_stage_file
from tpuvid.runs.kept.record import read_record
from tpuvid.runs.kept.savepoints import Savepoints
from tpuvid.runs.kept.work import Manifest

from torture.audit import check_silence
from torture.children import run

Read = Callable[[Path], Any]
"""What a run would make of the file: raises `InputError`, or gives something that can be compared."""


def samples(work: Path) -> dict[str, tuple[Path, Read]]:
    """A file of each kind, made by tpuvid, and how it is read."""
    folder = work / "samples"
    common = ["--model", "wan-tiny"]
    (work / "one.txt").write_text("a red circle")
    for command in (
        ["encode", *common, "--prompt", "a red circle", "--output-dir", str(folder)],
        ["denoise", "--input-dir", str(folder), "--num-frames", "5", "--steps", "3"],
        ["decode", "--input-dir", str(folder), "--save-frames"],
        [
            "generate",
            *common,
            "--prompts",
            str(work / "one.txt"),
            "--steps",
            "2",
            "--num-frames",
            "5",
            "--output-dir",
            str(folder),
        ],
        ["compile", *common, "--topology", "cpu", "--num-frames", "5", "-o", str(folder / "cpu.pack.safetensors")],
    ):
        outcome = run(command, work)
        assert outcome.code == 0, outcome.err
    denoise = ["denoise", "--input-dir", str(folder), "--num-frames", "5", "--steps", "9", "--savepoint-every", "2"]
    made = run(
        [*denoise, "--overwrite"],
        work,
        until=lambda seconds: len(list((folder / ".tpuvid").glob("denoising-*-00004*"))) > 0,
    )
    assert made.code is None, "it ended before it was killed"
    (savepoint,) = (folder / ".tpuvid").glob("denoising-*-00004.safetensors")
    shutil.copy(savepoint, folder)
    tiny = Checkpoint("x", folder=Path(__import__("tpuvid_tiny").__file__).parent / "checkpoint").folder
    shutil.copytree(tiny, work / "model")
    weights = next((work / "model" / "vae").glob("*.safetensors"))
    return {
        "embeddings": (folder / EMBEDDINGS, lambda p: vars_of(load_conditioning(p))),
        "latents": (folder / LATENTS, lambda p: (load_latents(p).tensors["latents"].tobytes(), load_latents(p).settings)),
        "frames": (folder / FRAMES, lambda p: read_stage_file(p).tensors["frames"].tobytes()),
        "savepoint": (folder / savepoint.name, _savepoint),
        "settings": (folder / "generation_config.json", read_config),
        "record in an mp4": (folder / "output_video.mp4", _record_in),
        "record beside it": (folder / "output_video.json", read_record),
        "batch.json": (folder / "batch.json", lambda p: Manifest(p.parent).videos if p.name == "batch.json" else None),
        "finished video of a batch": (next(folder.glob("a-red-circle_42.mp4")), _finished_in(folder)),
        "pack": (folder / "cpu.pack.safetensors", lambda p: (read_pack(p).key, read_pack(p).programs)),
        "weights": (weights, lambda p: Checkpoint("x", folder=p.parent.parent).fingerprint()),
        "model config": (
            work / "model" / "vae" / "config.json",
            lambda p: (read_json(p), Checkpoint("x", folder=p.parent.parent).fingerprint()),
        ),
    }  # fmt: skip


def vars_of(conditioning: Any) -> Any:
    tensors = {name: value.tobytes() for name, value in conditioning.tensors.items()}
    return tensors, conditioning.prompt, conditioning.negative_prompt, conditioning.max_sequence_length, conditioning.model_id


def _savepoint(path: Path) -> Any:
    state = Savepoints(path.parent, {})._read  # as `latest` reads it, whose key is that of the run
    file = read_stage_file(path)
    if not file.checked:
        raise InputError("has no checksum")
    assert state
    return {name: value.tobytes() for name, value in file.tensors.items()}, dict(file.metadata)


def _record_in(path: Path) -> Any:
    """Without the file beside it, which would stand in."""
    return read_record(path)


def _finished_in(folder: Path) -> Read:
    manifest = Manifest(folder)
    name, entry = next(iter(manifest.videos.items()))

    def read(path: Path) -> bool:
        if not Manifest(path.parent).is_done(name, entry["key"]):
            raise InputError("is not done: it would be made again")
        return True

    return read


def torture(work: Path, count: int, rng: random.Random) -> Counter:
    """So many damages over all kinds in turn; returns the counts."""
    counts: Counter = Counter()
    found = samples(work)
    place = work / "damaged"
    for number in range(count):
        kind = list(found)[number % len(found)]
        path, read = found[kind]
        shutil.rmtree(place, ignore_errors=True)
        target = _stage(kind, path, place)
        expected = read(target)
        data = bytearray(target.read_bytes())
        whole = bytes(data)
        if rng.random() < 0.25:
            how = "truncated"
            del data[rng.randrange(len(data)) :]
        else:
            how = "flipped"
            for _ in range(rng.choice((1, 1, 1, 2, 8))):
                data[_anywhere(data, rng)] ^= 1 << rng.randrange(8)
        target.write_bytes(data)
        try:
            seen = read(target)
        except InputError as error:
            assert "\n" not in str(error)
            counts[f"{kind}: refused"] += 1
        except TpuvidError as error:
            raise AssertionError(f"{kind}, {how}: {error}") from error
        else:
            harmless = seen == expected if kind not in ("weights", "model config") else seen != expected or bytes(data) == whole
            assert harmless, f"{kind}, {how}: another content was taken for right ({target})"
            counts[f"{kind}: {'told apart' if kind in ('weights', 'model config') else 'without effect'}"] += 1
        if number % 10 == 0:
            _inspect(target)
    return counts


def _stage(kind: str, path: Path, place: Path) -> Path:
    """A copy to be damaged, with what it is read with."""
    if kind in ("weights", "model config"):
        shutil.copytree(path.parent.parent, place)
        return place / path.parent.name / path.name
    place.mkdir()
    shutil.copy(path, place)
    if kind == "finished video of a batch":
        shutil.copy(path.parent / "batch.json", place)
    return place / path.name


def _anywhere(data: bytearray, rng: random.Random) -> int:
    """Headers are small and matter most: every second hit is in the first kilobytes."""
    return rng.randrange(min(len(data), 4096) if rng.random() < 0.5 else len(data))


def _inspect(path: Path) -> None:
    """Looking at it, and comparing it with itself, ends with an answer or a line."""
    import contextlib
    import io

    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        codes = tpuvid(["inspect", str(path)]), tpuvid(["compare", str(path), str(path)])
    check_silence(err.getvalue())
    assert codes[0] in (0, 1, 2) and codes[1] in (0, 2), (codes, err.getvalue())  # 1: a video that is cut short
