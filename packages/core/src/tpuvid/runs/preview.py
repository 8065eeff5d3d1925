"""Cheap pictures of latents: a linear map from a latent to the colour of its pixels, which a model's package brings, or which
is fitted from the checkpoint's own VAE.

The first latent frame stands for one frame of the video and the others for several, so that they have a map each: in JSON,
"weights" [2, C + 1, 3], of each channel of what the VAE decodes, and of one.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tpuvid.compute.progress import current
from tpuvid.contract.digests import digest_of
from tpuvid.contract.models import ModelSpec, imported
from tpuvid.errors import InputError
from tpuvid.files.atomic import atomic_path, write_json
from tpuvid.files.cache_folder import cache_folder
from tpuvid.files.checkpoint import Checkpoint
from tpuvid.files.mp4 import to_uint8
from tpuvid.files.weights import weight_files

CLIPS, FRAMES, SIDE = 32, 9, 128
"""What is fitted to: so many clips of random colours, of so many frames and pixels."""
SHOWN = 256
"""Pixels of a preview's larger side, about."""
FRAME_SECONDS = 0.25


class Denormalises(Protocol):
    def denormalise(self, latents: np.ndarray) -> np.ndarray:
        """What the VAE decodes, of what the diffusion model leaves."""


@dataclass
class Preview:
    """Pictures of a run's latents, in the animated PNG at `path`."""

    decoder: Denormalises
    weights: np.ndarray
    """[2, C + 1, 3], of the first frame and of the others: of each channel, and of one."""
    path: Path
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "preview"))
    _next: Callable[[], np.ndarray] | None = None

    @classmethod
    def of(cls, spec: ModelSpec, checkpoint: Checkpoint, decoder: Any, path: Path) -> Preview:
        """By the map that the package of a registered model brings; else fitted. Raises `InputError` as `fit` does."""
        if spec.preview is None or spec.twin is not None:
            return cls.fit(checkpoint, decoder, path)
        package, _, file = spec.preview.partition(":")
        return cls(decoder, _kept(Path(str(files(package))) / file), path)

    @classmethod
    def fit(cls, checkpoint: Checkpoint, decoder: Any, path: Path) -> Preview:
        """Raises `InputError` for a model whose decoder has neither `denormalise` nor `stock_vae`, as `VaeDecoder` has."""
        if not hasattr(decoder, "denormalise") or getattr(decoder, "stock_vae", None) is None:
            raise InputError(f"preview: {checkpoint.model_id} has no previews; leave it out")
        checkpoint.require(("vae",))  # also where another decoder runs
        folder = checkpoint.component("vae")
        shards = [[file.name, (stat := file.stat()).st_size, stat.st_mtime_ns] for file in weight_files(folder)]
        kept = cache_folder("preview") / f"{digest_of([str(folder), shards])[:16]}.json"
        return cls(decoder, _kept(kept) if kept.exists() else _fitted(imported(decoder.stock_vae), folder, kept), path)

    def show_soon(self, latents: Callable[[], np.ndarray]) -> None:
        """`show` in a thread of its own, so that no step waits for it. Of pictures that come faster than they are written, only
        the last counts; one that can't be written is given up."""
        self._next = latents
        self._writer.submit(self._show_next)

    def close(self) -> None:
        """Wait for the last picture."""
        self._writer.shutdown()

    def _show_next(self) -> None:
        latents, self._next = self._next, None
        if latents is None:  # a later one has been shown in the place of this
            return
        try:
            self.show(latents())
        except Exception as error:  # whatever it is, the video goes on
            warnings.warn(f"preview: {error}", stacklevel=1)

    def show(self, latents: np.ndarray) -> None:
        """Write the picture of latents [B, C, f, h, w]: a frame of each latent frame, the videos of a batch side by side."""
        from PIL import Image

        frames = np.concatenate([self.pictures(video) for video in latents], axis=2)
        zoom = max(1, round(SHOWN / max(frames.shape[1:3])))
        size = frames.shape[2] * zoom, frames.shape[1] * zoom
        first, *rest = [Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR) for frame in to_uint8(frames)]
        with atomic_path(self.path, overwrite=True) as temporary:
            duration = round(1000 * FRAME_SECONDS)
            first.save(temporary, format="PNG", save_all=True, append_images=rest, duration=duration, loop=0, compress_level=1)

    def pictures(self, latents: np.ndarray) -> np.ndarray:
        """Latents of one video [C, f, h, w] → frames [f, h, w, 3] in [0, 1], about."""
        z = np.moveaxis(self.decoder.denormalise(latents[None].astype(np.float32))[0], 0, -1)
        return np.concatenate([part @ map[:-1] + map[-1] for part, map in zip((z[:1], z[1:]), self.weights, strict=True)])


def _kept(path: Path) -> np.ndarray:
    try:
        weights = np.array(json.loads(path.read_text("utf-8"))["weights"], np.float32)
        if weights.ndim == 3 and weights.shape[::2] == (2, 3) and np.isfinite(weights).all():
            return weights
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path}: is damaged; remove it")


def _fitted(stock_vae: Any, folder: Path, kept: Path) -> np.ndarray:
    """The weights, fitted by least squares to what the VAE makes of clips."""
    with current().phase("fit preview"):
        weights = _of_clips(stock_vae.from_pretrained(folder, use_safetensors=True, local_files_only=True))
    write_json(kept, {"weights": weights.tolist()}, overwrite=True)
    return weights.astype(np.float32)


def _of_clips(vae: Any) -> np.ndarray:
    known: tuple[list, list] = [], []
    colours: tuple[list, list] = [], []
    for clip in _clips():
        latents = _encode(vae, clip * 2 - 1)
        channels, count, height, width = latents.shape
        pixels = clip.reshape(3, FRAMES, height, SIDE // height, width, SIDE // width).mean(axis=(3, 5))
        later = pixels[:, 1:].reshape(3, count - 1, -1, height, width).mean(axis=2)
        for i, (x, y) in enumerate(((latents[:, :1], pixels[:, :1]), (latents[:, 1:], later))):
            known[i].append(x.reshape(channels, -1).T)
            colours[i].append(y.reshape(3, -1).T)
    return np.stack([_least_squares(np.concatenate(x), np.concatenate(y)) for x, y in zip(known, colours, strict=True)])


def _least_squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.linalg.lstsq(np.c_[x, np.ones(len(x))], y, rcond=None)[0]


def _clips() -> Iterator[np.ndarray]:
    """[3, F, H, W] in [0, 1]: discs and squares that move over a ground, in random colours, pure ones among them."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    for _ in range(CLIPS):
        clip = np.broadcast_to(_colour(random)[:, None, None, None], (3, FRAMES, SIDE, SIDE)).copy()
        for _ in range(random.integers(1, 4)):
            colour, place, motion, size = (
                _colour(random),
                random.random(2),
                random.normal(size=2) * 0.3,
                random.uniform(0.1, 0.4),
            )
            norm = (np.hypot, lambda a, b: np.maximum(abs(a), abs(b)))[random.integers(2)]
            for frame in range(FRAMES):
                at = place + motion * frame / FRAMES
                clip[:, frame, norm(y - at[0], x - at[1]) < size] = colour[:, None]
        yield clip.astype(np.float32)


def _colour(random: np.random.Generator) -> np.ndarray:
    return random.random(3) if random.random() < 0.5 else random.choice([0.0, 0.5, 1.0], 3)


def _encode(vae: Any, clip: np.ndarray) -> np.ndarray:
    """Pixels [3, F, H, W] in [−1, 1] → latents [C, f, h, w], as the VAE decodes them."""
    import torch

    with torch.no_grad():
        return vae.encode(torch.from_numpy(clip.astype(np.float32))[None]).latent_dist.mode()[0].float().numpy()
