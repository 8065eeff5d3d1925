"""How far two videos are apart: PSNR and SSIM of mp4s, frames files or latents files. Imports neither jax nor torch.

Videos are read frame by frame: neither is held as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tpuvid.contract.paths import path_of
from tpuvid.errors import InputError
from tpuvid.files.colours import to_rgb
from tpuvid.files.mp4 import no_mp4
from tpuvid.files.readers import readable_safetensors
from tpuvid.files.stage_files import FRAMES, LATENTS, load_latents

SSIM_WINDOW = 11
"""Pixels: Gaussian weights of sigma 1.5, as in Wang et al., "Image quality assessment" (2004)."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""The floating-point dtypes, as safetensors names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What `compare` finds; `a` is the reference. Differences are in the values' own units."""

    a: str
    b: str
    kind: str
    """"frames", in [0, 1], or "latents"."""
    shape: tuple[int, ...]
    """[F, H, W, C], of latents [f, h, w, C]."""
    data_range: float
    """1 for frames; for latents the largest value of `a` less its smallest."""
    identical: bool
    psnr: float
    """The PSNR in dB, of the mean squared error over all values; infinite where identical."""
    ssim: float | None
    """Mean over frames; None where a side is below `SSIM_WINDOW`."""
    largest_difference: float
    mean_difference: float
    worst_frame: int | None
    """The frame where the mean squared error is largest, from 0; None where identical."""
    worst_frame_psnr: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: None in the place of what is infinite."""
        return {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class _Source:
    path: Path
    kind: str
    pictures: Callable[[], Iterator[np.ndarray]]
    """Gives the pictures [H, W, C] one by one, at least one; uint8 is of 255."""


def compare(a: str | Path, b: str | Path) -> Comparison:
    """Measure `b` against the reference `a`: each an .mp4, a file of frames or latents, or a folder that holds one.

    Of a folder, the frames are taken, else the mp4, else the latents. An mp4 and frames are of one kind.
    SSIM is scikit-image's with Gaussian weights and the population covariance, as in Wang et al. (2004).

    Raises:
        InputError: a missing, truncated or foreign file; two kinds; two shapes; values that are not finite or not in [0, 1].
    """
    sources = _open(path_of(a)), _open(path_of(b))
    kinds = [source.kind for source in sources]
    if kinds[0] != kinds[1]:
        raise InputError(
            f"{sources[0].path} holds {kinds[0]}, {sources[1].path} holds {kinds[1]}; compare two of one kind: "
            "tpuvid decode makes frames of latents"
        )
    data_range = _latents_range(sources[0]) if kinds[0] == "latents" else 1.0
    return _measure(*sources, data_range)


def _measure(a: _Source, b: _Source, data_range: float) -> Comparison:
    squares: list[float] = []
    similar: list[float] = []
    largest = total = 0.0
    shape: tuple[int, ...] = ()
    for x, y in _pairs(a, b):
        shape = x.shape
        difference = np.abs(x - y)
        largest = max(largest, float(difference.max()))
        total += float(difference.mean())
        squares.append(float(np.mean(difference**2)))
        if min(shape[:2]) >= SSIM_WINDOW:
            similar.append(_ssim(x, y, data_range))
    count = len(squares)
    identical = largest == 0
    worst = int(np.argmax(squares))
    return Comparison(
        a=str(a.path),
        b=str(b.path),
        kind=a.kind,
        shape=(count, *shape),
        data_range=data_range,
        identical=identical,
        psnr=_psnr(sum(squares) / count, data_range),
        ssim=sum(similar) / count if similar else None,
        largest_difference=largest,
        mean_difference=total / count,
        worst_frame=None if identical else worst,
        worst_frame_psnr=_psnr(squares[worst], data_range),
    )


def _psnr(square: float, data_range: float) -> float:
    return 10 * math.log10(data_range**2 / square) if square else math.inf


def _ssim(x: np.ndarray, y: np.ndarray, data_range: float) -> float:
    from skimage.metrics import structural_similarity

    return float(
        structural_similarity(
            x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1, data_range=data_range
        )
    )


def _pairs(a: _Source, b: _Source) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pictures that belong together, as float64; raises `InputError` where the shapes differ, naming both in full."""
    left, right = a.pictures(), b.pictures()
    count, shape = 0, ()
    while True:
        x, y = next(left, None), next(right, None)
        if x is None and y is None:
            return
        if x is None or y is None or x.shape != y.shape:
            sizes = []
            for source, picture, rest in ((a, x, left), (b, y, right)):
                size = shape if picture is None else picture.shape
                frames = count + (picture is not None) + sum(1 for _ in rest)
                sizes.append(f"{source.path} is {[frames, *size]}")
            raise InputError(f"{sizes[0]}, {sizes[1]}; compare {a.kind} of one shape")
        count, shape = count + 1, x.shape
        yield _as_float(a, x), _as_float(b, y)


def _as_float(source: _Source, picture: np.ndarray) -> np.ndarray:
    if picture.dtype == np.uint8:
        return picture / 255
    picture = picture.astype(np.float64)
    low, high = picture.min(), picture.max()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(f"{source.path}: holds NaN or infinity, which no measure can compare; make it again")
    if source.kind == "frames" and (low < 0 or high > 1):
        raise InputError(f"{source.path}: frames reach from {low:g} to {high:g}, not within [0, 1]; scale them")
    return picture


def _open(path: Path) -> _Source:
    """What `path` holds, by its name; only headers are read yet, and latents."""
    if path.is_dir():
        return _open(_in_folder(path))
    if not path.exists():
        raise InputError(f"{path}: does not exist; give an .mp4, a stage file or a folder with one")
    if path.suffix == ".mp4":
        return _Source(path, "frames", lambda: _mp4(path))
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: is neither an .mp4 nor a .safetensors file; give one, or a folder that holds one")
    with _stage_file(path) as file:
        names = sorted(file.keys())
        if "latents" in names:
            return _latents(path)
        if "frames" not in names:
            raise InputError(f"{path}: holds {', '.join(names[:3]) or 'no tensors'}, neither frames nor latents")
        frames = file.get_slice("frames")
        shape, dtype = frames.get_shape(), frames.get_dtype()
    if len(shape) != 5 or 0 in shape or dtype not in FLOATS:
        raise InputError(f"{path}: frames are {dtype} {shape}, not floating point [B, F, H, W, C]; make the file again")
    _check_one(path, shape)
    return _Source(path, "frames", lambda: _stored_frames(path))


def _in_folder(folder: Path) -> Path:
    videos = sorted(folder.glob("*.mp4"))
    for found in ([folder / FRAMES], videos, [folder / LATENTS]):
        found = [path for path in found if path.exists()]
        if len(found) > 1:
            raise InputError(
                f"{folder}: holds {len(found)} videos ({', '.join(path.name for path in found[:3])}); name one of them"
            )
        if found:
            return found[0]
    raise InputError(f"{folder}: holds neither {FRAMES} nor an .mp4 nor {LATENTS}; give a file or another folder")


@contextmanager
def _stage_file(path: Path) -> Iterator[Any]:
    from safetensors import safe_open

    with readable_safetensors(path), safe_open(path, framework="numpy") as file:
        yield file


def _check_one(path: Path, shape: Any) -> None:
    if shape[0] != 1:
        raise InputError(f"{path}: holds {shape[0]} videos; compare takes one, split the file")


def _latents(path: Path) -> _Source:
    latents = load_latents(path).tensors["latents"]
    _check_one(path, latents.shape)
    if 0 in latents.shape or (latents.dtype.kind != "f" and latents.dtype.name != "bfloat16"):
        raise InputError(f"{path}: latents are {latents.dtype} {list(latents.shape)}; make the file again")
    pictures = latents[0].astype(np.float64).transpose(1, 2, 3, 0)
    return _Source(path, "latents", lambda: iter(pictures))


def _latents_range(source: _Source) -> float:
    lows, highs = zip(*((p.min(), p.max()) for p in (_as_float(source, p) for p in source.pictures())), strict=True)
    data_range = float(max(highs) - min(lows))
    if not data_range:
        raise InputError(f"{source.path}: all latents are {lows[0]:g}, which gives PSNR no range; give another reference")
    return data_range


def _stored_frames(path: Path) -> Iterator[np.ndarray]:
    with _stage_file(path) as file:
        frames = file.get_slice("frames")
        for i in range(frames.get_shape()[1]):
            yield frames[0, i]


def _mp4(path: Path) -> Iterator[np.ndarray]:
    import av

    try:
        with av.open(str(path)) as container:
            streams, frame = container.streams.video, None
            for frame in container.decode(streams[0]) if streams else ():
                yield to_rgb(frame)
            if frame is None:
                raise InputError(f"{path}: holds no pictures; it is truncated or no video: make or fetch it again")
    except av.error.FFmpegError as error:
        raise no_mp4(path, error) from None


def middle_frame(path: Path) -> np.ndarray:
    """The frame in the middle of an mp4: [H, W, 3], uint8. Raises `InputError` for what is no mp4."""
    count = sum(1 for _ in _mp4(path))
    return next(frame for i, frame in enumerate(_mp4(path)) if i == count // 2)


def render(found: Comparison) -> str:
    """`compare`'s result for people."""
    lines = [f"A: {found.a} (the reference)", f"B: {found.b}", f"{found.kind} {list(found.shape)}"]
    if found.identical:
        return "\n".join([*lines, "identical: every value is the same, PSNR is infinite"])
    ssim = f"not defined below {SSIM_WINDOW} pixels" if found.ssim is None else f"{found.ssim:.6f}"
    lines += [
        f"PSNR: {found.psnr:.2f} dB of a range of {found.data_range:g}; "
        f"worst in frame {found.worst_frame}, {found.worst_frame_psnr:.2f} dB",
        f"SSIM: {ssim}",
        f"difference: largest {found.largest_difference:.6g}, mean {found.mean_difference:.6g}",
    ]
    return "\n".join(lines)
