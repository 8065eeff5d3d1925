"""Where the program that is being traced will run: what every kernel chooses its implementation by."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import jax
from jax.sharding import Mesh

from tpuvid.compute.kernels.window import Window

SP = "sp"
"""The mesh axis that tokens, and strips of frames, are split over."""
ATTENTION_BACKENDS = {
    "auto": "any platform",
    "xla": "any platform",
    "flash": "tpu",
    "flash-smooth-k": "tpu",
    "flash-int8": "tpu",
    "splash": "tpu",
    "cudnn": "gpu",
}
WINDOWED_BACKENDS = ("auto", "xla", "flash", "flash-smooth-k")
"""The attention backends that can hide what is outside an attention window."""


@dataclass(frozen=True, slots=True)
class TokenSplit:
    """Tokens in parts over the mesh axis ``sp``."""

    parts: int
    lengths: Mapping[str, int]
    """How many tokens each argument of a block has in all, without padding, by its name."""

    def padding(self, name: str, count: int) -> int:
        """Tokens that were added to those of `name` so that each part has `count`."""
        return self.parts * count - self.lengths[name]


@dataclass(frozen=True, slots=True)
class SpatialSplit:
    """Frames in strips over the mesh axis ``sp``."""

    axis: int
    """−2: by height, −1: by width."""
    parts: int
    length: int
    """Latents along that side, in all."""
    size: int
    """Latents of a strip; the last one may have fewer that are the picture's."""
    other: int
    """Latents along the other side."""


@dataclass(frozen=True, slots=True)
class Placement:
    mesh: Mesh | None = None
    attention_backend: str = "auto"
    tokens: TokenSplit | None = None
    spatial: SpatialSplit | None = None
    """Either is set where what is traced runs inside a `shard_map` over all axes of the mesh."""
    window: Window | None = None
    """The window of the attention among a video's tokens."""

    @property
    def is_local(self) -> bool:
        """Whether what is traced sees what one device has."""
        return self.tokens is not None or self.spatial is not None

    @property
    def platform(self) -> str:
        """ "tpu", "gpu" or "cpu": of the mesh, which may be of a machine elsewhere, or else this process's default."""
        return self.mesh.devices.flat[0].platform if self.mesh is not None else jax.default_backend()


_NOWHERE = Placement()
_current: ContextVar[Placement] = ContextVar("placement", default=_NOWHERE)


def placement() -> Placement:
    return _current.get()


@contextmanager
def placed_on(mesh: Mesh, attention_backend: str = "auto") -> Iterator[None]:
    """Within it, kernels are traced for the devices of `mesh`; raises `ValueError` where the backend can't run there."""
    found = Placement(mesh, attention_backend)
    runs_on = ATTENTION_BACKENDS.get(attention_backend)
    if runs_on is None:
        raise ValueError(f"attention backend {attention_backend!r} is not known; choose from {', '.join(ATTENTION_BACKENDS)}")
    if runs_on not in ("any platform", found.platform):
        raise ValueError(
            f"attention backend {attention_backend!r} runs on {runs_on}, these devices are {found.platform}; use auto"
        )
    with _set(found):
        yield


@contextmanager
def tokens_split(split: TokenSplit) -> Iterator[None]:
    """Within it, functions are traced for one part of the tokens."""
    with _set(replace(placement(), tokens=split)):
        yield


@contextmanager
def picture_split(split: SpatialSplit) -> Iterator[None]:
    """Within it, functions are traced for one strip of the frames."""
    with _set(replace(placement(), spatial=split)):
        yield


@contextmanager
def attention_window(window: Window | None) -> Iterator[None]:
    """Within it, a video's tokens see each other through `window`; None: all see all."""
    with _set(replace(placement(), window=window)):
        yield


@contextmanager
def _set(found: Placement) -> Iterator[None]:
    token = _current.set(found)
    try:
        yield
    finally:
        _current.reset(token)
