"""Frames, as they come, → an mp4 that plays in a browser."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tpuvid.contract.paths import path_of
from tpuvid.errors import InputError, TpuvidError
from tpuvid.files import colours
from tpuvid.files.atomic import atomic_path

# x264's macroblock tree gives other files for the same frames: 14 different ones in 150 runs, with mbtree=0 one (PyAV 18.1)
X264 = {"crf": "16", "x264-params": "mbtree=0"}
FASTSTART = {"movflags": "+faststart"}
METADATA = "comment"
"""The tag that holds the record as JSON: players and ``ffprobe`` show it."""


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """[..., C] in [0, 1] → 0 … 255, rounded."""
    return (np.clip(frames, 0, 1) * 255 + 0.5).astype(np.uint8)


def save_mp4(
    frames: np.ndarray, path: str | Path, *, fps: int, overwrite: bool = False, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write frames [F, H, W, 3] in [0, 1] as H.264 (yuv420p, index first). Raises `InputError` if `path` exists or is no .mp4.

    The same frames and metadata give the same file, byte for byte. Sides must be even, as 4:2:0 chroma wants; every supported
    model's are.
    """
    path = path_of(path)
    check_mp4_name(path)
    with atomic_path(path, overwrite=overwrite) as temporary:
        with Mp4Writer(temporary, fps=fps) as writer:
            writer.write(frames)
        if metadata is not None:
            set_metadata(temporary, metadata)
    return path


def check_mp4_name(path: Path) -> None:
    if path.suffix != ".mp4":
        raise InputError(f"{path}: videos are written as .mp4; give a name that ends so")


class Mp4Writer:
    """An mp4 at `path`, encoded frame by frame: none is held."""

    def __init__(self, path: Path, *, fps: int):
        self.path, self.fps = path, fps
        self.frames = 0
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """The hash of all pixels so far, as uint8 [F, H, W, 3]."""
        return self._digest.hexdigest()

    def __enter__(self) -> Mp4Writer:
        import av

        with _encoder_errors(self.path):
            self._container = av.open(str(self.path), "w", format="mp4", options=FASTSTART)
            self._stream = self._container.add_stream("libx264", rate=self.fps, options=X264)
            self._stream.pix_fmt = "yuv420p"
            colours.declare(self._stream)
        return self

    def write(self, frames: np.ndarray) -> None:
        """Write the next frames: [n, H, W, 3] in [0, 1]."""
        if not self.frames:
            self._stream.height, self._stream.width = frames.shape[1:3]
        with _encoder_errors(self.path):
            for frame in map(to_uint8, frames):
                self._digest.update(np.ascontiguousarray(frame).data)
                self.frames += 1
                for packet in self._stream.encode(colours.from_rgb(frame)):
                    self._container.mux(packet)

    def __exit__(self, kind: type | None, *_: object) -> None:
        with _encoder_errors(self.path):
            try:
                if kind is None:
                    for packet in self._stream.encode():
                        self._container.mux(packet)
            finally:
                self._container.close()


@contextmanager
def _encoder_errors(path: Path) -> Iterator[None]:
    import av

    try:
        yield
    except av.error.FFmpegError as error:
        if isinstance(error, OSError):
            raise  # the disk's fault: atomic_path says so
        raise TpuvidError(f"{path}: the video encoder failed ({error})") from error


def set_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    """Put JSON-ready `metadata` into the mp4 at `path`, whose pictures stay as they are."""
    import av

    tagged = path.with_name(f"{path.stem}-tagged{path.suffix}")
    try:
        with _encoder_errors(path), av.open(str(path)) as source, av.open(
            str(tagged), "w", format="mp4", options=FASTSTART
        ) as target:  # fmt: skip
            stream = target.add_stream_from_template(source.streams.video[0])
            target.metadata[METADATA] = json.dumps(metadata, ensure_ascii=False)
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
        tagged.replace(path)
    finally:
        tagged.unlink(missing_ok=True)


def read_metadata(path: Path) -> dict[str, Any] | None:
    """What `set_metadata` put into an mp4; None where there is nothing of the kind. Raises `InputError` for what is no mp4."""
    import av

    try:
        with av.open(str(path)) as container:
            text = container.metadata.get(METADATA, "")
    except (av.error.FFmpegError, OSError) as error:
        raise no_mp4(path, error) from None
    except UnicodeDecodeError:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def video_size(path: Path) -> dict[str, Any]:
    """Width, height, frames and frames per second of an mp4; raises `InputError` for what is none."""
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise InputError(
                    f"{path}: holds pictures that nothing here can decode; it is damaged, or another tool's: fetch it again"
                )
            frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
            return {"width": stream.width, "height": stream.height, "frames": frames, "fps": float(stream.average_rate or 0)}
    except (av.error.FFmpegError, OSError, IndexError) as error:
        raise no_mp4(path, error) from None


def is_cut_short(path: Path) -> bool:
    """Whether an mp4 ends before its last box does (ISO/IEC 14496-12): it was copied or fetched in part."""
    size = path.stat().st_size
    with path.open("rb") as file:
        at = 0
        while at < size:
            file.seek(at)
            head = file.read(16)
            length = int.from_bytes(head[:4], "big")
            if length == 1:  # the size stands in the eight bytes after the name
                length = int.from_bytes(head[8:], "big")
            if length == 0:  # to the end of the file
                return False
            if length < 8 or (at == 0 and head[4:8] != b"ftyp"):
                return False  # something else is wrong with it, or it is no mp4
            at += length
    return at > size


def no_mp4(path: Path, error: Exception) -> InputError:
    """What to raise where `error` says that `path` can't be read."""
    reason = getattr(error, "strerror", None) or error
    return InputError(f"{path}: can't be read ({reason}); it is truncated or no mp4: make or fetch it again")
