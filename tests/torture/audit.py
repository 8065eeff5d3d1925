"""What has to hold of a folder at any moment, whatever was done to the processes that write there."""

import hashlib
import json
from pathlib import Path

from tpuvid.files.digests import check_seal
from tpuvid.files.mp4 import video_size
from tpuvid.files.stage_files import read_stage_file
from tpuvid.runs.kept.record import read_record


def check_folder(folder: Path, finished: dict[Path, str]) -> None:
    """Every file that has its own name is whole, and a video that was finished is still as it was.

    `finished` grows: the hash of each video.
    """
    for path in folder.rglob("*"):
        if not path.is_file() or path.name.startswith(".tpuvid-") or path.suffix == ".lock":
            continue
        match path.suffix:
            case ".mp4":
                assert video_size(path)["frames"] >= 5 and read_record(path)
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                assert finished.setdefault(path, digest) == digest, f"{path} has changed"
            case ".safetensors":
                assert read_stage_file(path).checked, f"{path} has no checksum"
            case ".json" if path.name == "batch.json":
                check_seal(path, json.loads(path.read_text()), "")
            case ".json":
                assert isinstance(json.loads(path.read_text()), dict)
    for path in finished:
        assert path.exists(), f"{path} was finished and is gone"


def left_over(folder: Path) -> list[str]:
    """Work and unfinished files, of which none are left where everything is done."""
    return [str(path.relative_to(folder)) for top in folder.glob(".*") for path in (top, *top.rglob("*"))]


def check_silence(err: str) -> None:
    """A user sees no traceback and no error that nobody foresaw."""
    assert "Traceback" not in err and "(unexpected" not in err, err
