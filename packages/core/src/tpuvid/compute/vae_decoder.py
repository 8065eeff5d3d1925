"""A VAE on all devices, each with a strip of the frames: what every family's decoding stands on.

Frames reach the host chunk by chunk, while the next are computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float
from torch import nn

from tpuvid.compute.inputs import check_latents
from tpuvid.compute.kernels.placement import SP, SpatialSplit, picture_split
from tpuvid.compute.kernels.spatial import choose_split
from tpuvid.compute.mesh import make_mesh
from tpuvid.compute.parameters import load_parameters, match_parameters
from tpuvid.compute.progress import current
from tpuvid.compute.runtime import LEAST_EFFORT, Runtime, replicated
from tpuvid.compute.tiles import Tiling
from tpuvid.compute.traced import TracedModule, build
from tpuvid.contract.layout import MeshConfig
from tpuvid.files.checkpoint import Checkpoint

EFFORT = -0.5
"""The effort of the TPU's compiler. With its own, each of a VAE's convolutions takes it 10 to 15 s; with this one 2.5 s, for
3% more predicted cycles in the large ones and 23% in the small (96 channels at 720×1280: 14.0 → 2.6 s, 41.9 → 43.1 ms;
2026-11).

`LEAST_EFFORT` is for the first frame and for strips of frames. Wan's at 720p (predicted, 2026-11): the first frame compiled in
22 s instead of 37, 0.10 s instead of 0.07; 32 more on eight chips in 31 s instead of 61, 0.22 s instead of 0.18."""

LATENTS, FRAMES = "B C n h w", "B n H W 3"
"""What programs of a VAE take and give; memories of convolutions are like latents."""


class VaeDecoder(ABC):
    """A `tpuvid.contract.stages.Decoder`; a family says how latents are scaled back and how they become chunks of frames."""

    component: ClassVar[str] = "vae"
    """The checkpoint's folder with its config and weights; a `tpuvid.contract.models.DecoderSpec` has its own."""
    stock_vae: ClassVar[str]
    """The class of diffusers that encodes too, as "module:class": what previews are fitted with."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        runtime: Runtime,
        module: nn.Module | TracedModule,
        *,
        channels: int,
        tiling: Tiling,
        unused: Sequence[str] = (),
    ):
        """`module` is the half that decodes; `unused` are prefixes of the weights of the other. `tiling` is what the stock
        ``enable_tiling()`` takes; it is used where the runtime asks for it, on one device."""
        self.checkpoint, self.runtime = checkpoint, runtime
        self.channels, self.unused = channels, unused
        self.tiling = tiling if runtime.vae_tiling else None
        self.traced = module if isinstance(module, TracedModule) else TracedModule(build(lambda: module))
        self.split: SpatialSplit | None = None
        self._place_on(1 if self.tiling else len(runtime.devices))

    def _place_on(self, devices: int) -> None:
        self.mesh = make_mesh(MeshConfig(sp=devices), self.runtime.devices)
        self.programs = self.runtime.programs(self.mesh, effort=EFFORT if devices == 1 else LEAST_EFFORT)
        self.once = self.runtime.programs(self.mesh, effort=LEAST_EFFORT)

    @abstractmethod
    def denormalise(self, latents: Float[np.ndarray, "B C f h w"]) -> Float[np.ndarray, "B C f h w"]:
        """What the VAE decodes, of what the diffusion model leaves."""

    @abstractmethod
    def chunks(self, z: Float[Array, "B C f h w"]) -> Iterator[Float[Array, "B n H W 3"]]:
        """Frames on the device, first to last, as `to_frames` gives them."""

    def verify(self) -> None:
        match_parameters(self.traced, self.checkpoint.weights(self.component), ignore=self.unused)

    def load(self) -> None:
        weights, dtype = self.checkpoint.weights(self.component), self.runtime.dtype
        self.params = load_parameters(self.traced, weights, mesh=self.mesh, dtype=dtype, ignore=self.unused)

    def check(self, tensors: Mapping[str, np.ndarray]) -> None:
        check_latents(tensors["latents"], self.channels)

    def decode(self, tensors: Mapping[str, np.ndarray]) -> Iterator[Mapping[str, np.ndarray]]:
        for frames in self._frames(tensors["latents"]):
            yield {"frames": frames}

    def _frames(self, latents: Float[np.ndarray, "B C f h w"]) -> Iterator[Float[np.ndarray, "B n H W 3"]]:
        z = self.denormalise(latents.astype(np.float32)).astype(self.runtime.dtype)
        if self.tiling:
            yield from self.tiling.decode(z, self._host_chunks)
            return
        self._split_for(*z.shape[-2:])
        for frames in self._host_chunks(z):
            yield self._cut(frames)

    def _split_for(self, height: int, width: int) -> None:
        """Latents of this size over the devices, or as many of them as there are strips."""
        self.split = choose_split(height, width, len(self.runtime.devices))
        parts = self.split.parts if self.split else 1
        if parts != self.mesh.size:
            self._place_on(parts)
            self.params = self.runtime.put(self.params, replicated(self.mesh))

    def call(
        self, what: str, function: Callable[..., Any], *args: Any, gives: Any, donate: tuple[int, ...] = (), once: bool = False
    ) -> Any:
        """``function(params, *args)`` as a compiled program, on each device with its strip.

        `args` are trees of `LATENTS`; `gives` says what the results are: a tree prefix of `LATENTS` and `FRAMES`. `once`: it
        runs once per video.
        """
        programs = self.once if once else self.programs
        run = function if self.split is None else self._in_strips(self.split, function, len(args), gives)
        return programs.get(what, run, self.params, *args, donate=donate, variant=self.split)(self.params, *args)

    def _in_strips(self, split: SpatialSplit, function: Callable[..., Any], args: int, gives: Any) -> Callable[..., Any]:
        def one_strip(*args: Any) -> Any:
            with picture_split(split):
                return function(*args)

        in_specs = PartitionSpec(), *(_spec(split, LATENTS),) * args
        out_specs = jax.tree.map(partial(_spec, split), gives)
        return jax.shard_map(one_strip, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def _put(self, z: Float[np.ndarray, "B C f h w"]) -> Float[Array, "B C f h2 w2"]:
        """The latents on the devices; with rows that are none of the picture's where strips don't divide it."""
        if self.split is None:
            return self.runtime.put(z, replicated(self.mesh))
        pads = [(0, 0)] * z.ndim
        pads[self.split.axis] = (0, self.split.size * self.split.parts - self.split.length)
        return self.runtime.put(np.pad(z, pads), NamedSharding(self.mesh, _spec(self.split, LATENTS)))

    def _cut(self, frames: Float[np.ndarray, "B n H2 W2 3"]) -> Float[np.ndarray, "B n H W 3"]:
        """The frames without the rows that are none of the picture's."""
        if self.split is None:
            return frames
        axis = frames.ndim + self.split.axis - 1
        length = frames.shape[axis] * self.split.length // (self.split.size * self.split.parts)
        return frames.take(range(length), axis) if length < frames.shape[axis] else frames

    def _host_chunks(self, z: Float[np.ndarray, "B C f h w"]) -> Iterator[Float[np.ndarray, "B n H W 3"]]:
        """One chunk behind the device, so that it works while this one is copied."""
        frames = None
        for upcoming in self.chunks(self._put(z)):
            if frames is not None:
                yield self._to_host(frames)
            frames = upcoming
        yield self._to_host(frames)

    def set_aside(self, memories: Any) -> Any:
        """What the next chunk will look back at. With tiles it waits on the host: until then the device is for the others."""
        return self._to_host(memories) if self.tiling else memories

    def _to_host(self, arrays: Any) -> Any:
        with current().phase("decode", detail=True):
            return self.runtime.fetch(arrays)

    def to_frames(self, pixels: Float[Array, "B 3 n H W"]) -> Float[Array, "B n H W 3"]:
        """Pixels in [−1, 1] → frames in [0, 1]; tiles are blended before they are clipped."""
        frames = pixels.astype(jnp.float32) / 2 + 0.5
        return jnp.moveaxis(frames if self.tiling else jnp.clip(frames, 0, 1), 1, -1)


def _spec(split: SpatialSplit, layout: str) -> PartitionSpec:
    side = "H" if split.axis == -2 else "W"
    return PartitionSpec(*(SP if name.upper() == side else None for name in layout.split()))


def split_evenly(count: int, most: int) -> int:
    """The largest part, up to `most`, of which `count` is a multiple: so that one compiled program serves all parts."""
    return next((n for n in range(most, 0, -1) if count % n == 0), 1)
