"""A VAE on one device: what every family's decoding stands on. Frames reach the host chunk by chunk, while the next are computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from torch import nn

from tpuvid.bridge import TracedModule, build
from tpuvid.checkpoint import Checkpoint
from tpuvid.runtime import Runtime, replicated
from tpuvid.sampling import check_latents
from tpuvid.tiling import Tiling
from tpuvid.weights import load_parameters, match_parameters

EFFORT = -0.5
"""Of the TPU's compiler. With its own, each of a VAE's convolutions takes it 10 to 15 s; with this one 2.5 s, for 3% more
predicted cycles in the large ones and 23% in the small (96 channels at 720×1280: 14.0 → 2.6 s, 41.9 → 43.1 ms; 2026-11)."""


EFFORT_ONCE = -1.0
"""For what runs once per video. Wan's first frame at 720p: compiled in 22 s instead of 37, 0.10 s instead of 0.07 (predicted, 2026-11)."""


class VaeDecoder(ABC):
    """A `tpuvid.stages.Decoder`; a family says how latents are scaled back and how they become chunks of frames."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        runtime: Runtime,
        module: nn.Module,
        *,
        channels: int,
        tiling: Tiling,
        unused: Sequence[str] = (),
    ):
        """`module` is the half that decodes; `unused` are prefixes of the weights of the other. `tiling` is what the stock
        ``enable_tiling()`` takes; it is used where the runtime asks for it."""
        self.checkpoint, self.runtime, self.mesh = checkpoint, runtime, runtime.single_device()
        self.channels, self.unused = channels, unused
        self.tiling = tiling if runtime.vae_tiling else None
        self.traced = TracedModule(build(lambda: module))
        self.programs = runtime.programs(self.mesh, effort=EFFORT)
        self.once = runtime.programs(self.mesh, effort=EFFORT_ONCE)

    @abstractmethod
    def denormalise(self, latents: Float[np.ndarray, "B C f h w"]) -> Float[np.ndarray, "B C f h w"]:
        """What the VAE decodes, of what the diffusion model leaves."""

    @abstractmethod
    def chunks(self, z: Float[Array, "B C f h w"]) -> Iterator[Float[Array, "B n H W 3"]]:
        """Frames on the device, first to last, as `to_frames` gives them."""

    def verify(self) -> None:
        match_parameters(self.traced, self.checkpoint.weights("vae"), ignore=self.unused)

    def load(self) -> None:
        weights, dtype = self.checkpoint.weights("vae"), self.runtime.dtype
        self.params = load_parameters(self.traced, weights, mesh=self.mesh, dtype=dtype, ignore=self.unused)

    def check(self, latents: np.ndarray) -> None:
        check_latents(latents, self.channels)

    def decode(self, latents: Float[np.ndarray, "B C f h w"]) -> Iterator[Float[np.ndarray, "B n H W 3"]]:
        z = self.denormalise(latents.astype(np.float32)).astype(self.runtime.dtype)
        yield from self.tiling.decode(z, self._host_chunks) if self.tiling else self._host_chunks(z)

    def _host_chunks(self, z: Float[np.ndarray, "B C f h w"]) -> Iterator[Float[np.ndarray, "B n H W 3"]]:
        """One chunk behind the device, so that it works while this one is copied."""
        frames = None
        for upcoming in self.chunks(self.runtime.put(z, replicated(self.mesh))):
            if frames is not None:
                yield self._to_host(frames)
            frames = upcoming
        yield self._to_host(frames)

    def set_aside(self, memories: Any) -> Any:
        """What the next chunk will look back at. With tiles it waits on the host: until then the device is for the others."""
        return self._to_host(memories) if self.tiling else memories

    def _to_host(self, arrays: Any) -> Any:
        with self.runtime.progress.phase("decode"):
            return self.runtime.fetch(arrays)

    def to_frames(self, pixels: Float[Array, "B 3 n H W"]) -> Float[Array, "B n H W 3"]:
        """Pixels in [−1, 1] → frames in [0, 1]; tiles are blended before they are clipped."""
        frames = pixels.astype(jnp.float32) / 2 + 0.5
        return jnp.moveaxis(frames if self.tiling else jnp.clip(frames, 0, 1), 1, -1)


def split_evenly(count: int, most: int) -> int:
    """The largest part, up to `most`, of which `count` is a multiple: so that one compiled program serves all parts."""
    return next((n for n in range(most, 0, -1) if count % n == 0), 1)
