"""Where and how a stage runs: devices, dtype, attention backend, compilation cache, progress."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpuvid.errors import InputError
from tpuvid.kernels import placed_on
from tpuvid.mesh import MeshConfig, default_mesh_config, make_mesh
from tpuvid.progress import Progress

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
CACHE_VARIABLE = "TPUVID_CACHE_DIR"


def default_dtype() -> str:
    """bfloat16 on accelerators; float32 on a CPU, which has no fast bfloat16."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def enable_compilation_cache() -> Path:
    """Keep compiled programs in TPUVID_CACHE_DIR (default: the user's cache folder) for later processes.

    A cache that the user has configured in JAX stays as it is. Raises `InputError` where the folder can't be made.
    """
    if jax.config.jax_compilation_cache_dir:
        return Path(jax.config.jax_compilation_cache_dir)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get(CACHE_VARIABLE) or home / "tpuvid") / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: can't be made ({error.strerror}); set {CACHE_VARIABLE} to a writable folder") from None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # a second run compiles nothing
    return folder


@dataclass(frozen=True)
class Runtime:
    dtype: np.dtype
    devices: Sequence[jax.Device] = field(default_factory=jax.devices)
    mesh_config: MeshConfig | None = None
    """Layout of the denoiser; None chooses one."""
    attention: str = "auto"
    vae_tiling: bool = False
    progress: Progress = field(default_factory=Progress)

    @classmethod
    def create(
        cls,
        *,
        dtype: str | None = None,
        mesh: MeshConfig | None = None,
        attention_backend: str = "auto",
        vae_tiling: bool = False,
        progress: Progress | None = None,
    ) -> Runtime:
        """A runtime on this machine's devices; raises `InputError` for what they can't do."""
        name = dtype or default_dtype()
        if name not in DTYPES:
            raise InputError(f"dtype={name!r}: choose from {', '.join(DTYPES)}")
        progress = progress or Progress()
        runtime = cls(DTYPES[name], mesh_config=mesh, attention=attention_backend, vae_tiling=vae_tiling, progress=progress)
        with runtime.scope(runtime.denoiser_mesh([1])):
            pass  # fails for a mesh or an attention backend that this machine can't run
        return runtime

    def denoiser_mesh(self, sizes: Iterable[int]) -> Mesh:
        """The user's layout; else one by the number of devices that divides `sizes` (heads and split widths)."""
        config = self.mesh_config or default_mesh_config(len(self.devices), sizes, guidance=True)
        return make_mesh(config, self.devices)

    def encoder_mesh(self, sizes: Iterable[int]) -> Mesh:
        """For a text encoder: as many devices as divide `sizes`; its layout is not the user's to choose."""
        return make_mesh(default_mesh_config(len(self.devices), sizes), self.devices)

    def single_device(self) -> Mesh:
        """For a stage that has no split: the first device alone."""
        return make_mesh(MeshConfig(), self.devices)

    @contextmanager
    def scope(self, mesh: Mesh) -> Iterator[None]:
        """Within it, functions are traced for `mesh`, and float32 means float32 on every platform."""
        precision = "highest" if self.dtype == np.float32 else None
        try:
            with placed_on(mesh, self.attention), jax.default_matmul_precision(precision):
                yield
        except ValueError as error:
            if "attention backend" in str(error):
                raise InputError(str(error)) from None
            raise

    def programs(self, mesh: Mesh) -> Programs:
        return Programs(self, mesh)


class Programs:
    """The compiled functions of one stage: each is compiled ahead of time, once for every set of argument shapes."""

    def __init__(self, runtime: Runtime, mesh: Mesh):
        self._runtime, self._mesh = runtime, mesh
        self._compiled: dict[tuple, Callable] = {}

    def get(self, what: str, function: Callable, *args: Any, donate: tuple[int, ...] = ()) -> Callable:
        """`function` compiled for arguments like `args` (arrays or shape structs); compiling is a phase of its own."""
        leaves, structure = jax.tree.flatten(args)
        key = (what, structure, tuple((leaf.shape, np.dtype(leaf.dtype)) for leaf in leaves))
        if key not in self._compiled:
            with self._runtime.progress.phase(f"compile {what}"), self._runtime.scope(self._mesh):
                self._compiled[key] = jax.jit(function, donate_argnums=donate).lower(*args).compile()
        return self._compiled[key]


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh, batch: int) -> NamedSharding:
    """Split over dp along the first dimension, where dp divides the batch."""
    return NamedSharding(mesh, PartitionSpec("dp") if batch % mesh.shape["dp"] == 0 else PartitionSpec())
