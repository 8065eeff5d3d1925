"""Where and how a stage runs: devices, dtype, attention backend, compilation cache."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpuvid.compute.chips import CHIPS
from tpuvid.compute.kept_programs import KeptPrograms
from tpuvid.compute.kernels import placed_on
from tpuvid.compute.kernels.block_sizes import block_rows, read_rows, tables_in_use
from tpuvid.compute.kernels.placement import WINDOWED_BACKENDS
from tpuvid.compute.lock import TRACING
from tpuvid.compute.mesh import Rule, default_mesh_config, make_mesh, split_sizes
from tpuvid.compute.packs.pack import Pack, signature
from tpuvid.compute.progress import current
from tpuvid.contract.layout import MeshConfig
from tpuvid.contract.options import OPTIONS, Options
from tpuvid.contract.paths import path_of
from tpuvid.errors import InputError, TpuvidError
from tpuvid.files.atomic import check_folder
from tpuvid.files.cache_folder import cache_folder
from tpuvid.plugin.registry import registry

if TYPE_CHECKING:
    from tpuvid.compute.traced import TracedModule
    from tpuvid.contract.settings import GenerationConfig

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
TPU_OPTIONS = {"xla_tpu_enable_async_all_to_all": True}
"""Options of the compiler. Wan 2.1 14B 720p on v6e-8: 3.34 → 3.29 s per step, other work hides half of the all-to-alls
(predicted)."""
CPU_OPTIONS = {"xla_backend_optimization_level": 1}
"""Programs of wan-tiny compile in 13 s instead of 20 s of CPU, and run as fast."""
LEAST_EFFORT = -1.0
"""The least effort of a TPU's compiler: for what runs once or twice per video, and takes little time."""
REPLICATED = 0.6
"""The share of a device's memory that copies of all weights may take: activations of a video need the rest."""


@cache
def plugin_tables() -> tuple[Path, ...]:
    """The tables of tile sizes that plugins bring. What is no table is left out, with a warning: programs run without it."""
    found = []
    for path in registry().block_sizes:
        try:
            read_rows(path)
            found.append(path)
        except ValueError as error:
            warnings.warn(f"a plugin's tile sizes are left out: {error}", stacklevel=2)
    return tuple(found)


def default_dtype() -> str:
    """bfloat16 on accelerators; float32 on a CPU, which has no fast bfloat16."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def enable_compilation_cache() -> Path:
    """Keep compiled programs in TPUVID_CACHE_DIR (default: the user's cache folder) for later processes.

    A cache that the user has configured in JAX stays as it is. Raises `InputError` where the folder can't be made.
    """
    configured = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # JAX adds its settings at run time
    if configured:
        return Path(configured)
    folder = cache_folder("xla")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # a second run compiles nothing
    return folder


@dataclass(frozen=True)
class Runtime:
    dtype: np.dtype
    devices: Sequence[jax.Device] = field(default_factory=jax.devices)
    mesh_config: MeshConfig | None = None
    """Layout of the denoiser; None chooses one."""
    attention_backend: str = "auto"
    text_encoder_device: str = "device"
    warmup_steps: int = 0
    """Runs of each denoising program before the first step that counts."""
    profile: Path | None = None
    """Folder for a JAX profile of denoising steps."""
    vae_tiling: bool = False
    pack: Pack | None = None
    """Programs that need not be compiled; checked by whoever knows what is to run."""
    options: Options = field(default_factory=Options)
    """What it was made with."""
    kept: KeptPrograms = field(default_factory=KeptPrograms)
    """What earlier processes have traced and compiled for one stage."""

    @classmethod
    def create(cls, options: Options | None = None, **given: Any) -> Self:
        """A runtime on this machine's devices; `given` are options by name, and its other fields.

        Raises `InputError` for what can't run here.
        """
        options = replace(options or Options(), **{name: given.pop(name) for name in OPTIONS if name in given})
        options.check()
        own = {f.name: getattr(options, f.name) for f in fields(cls) if f.name in OPTIONS}
        own |= {"dtype": DTYPES[options.dtype or default_dtype()], "mesh_config": options.layout}
        runtime = cls(**own | given, options=options)
        with runtime.scope(make_mesh(runtime.mesh_config or MeshConfig(), runtime.devices)):  # fails for what can't be had
            runtime.encoder_mesh([1])
        try:
            block_rows()
        except ValueError as error:
            raise InputError(str(error)) from None
        if runtime.profile is not None:
            folder = path_of(runtime.profile)
            runtime = replace(runtime, profile=folder)
            check_folder(folder)
        return runtime

    def asked(self) -> Options:
        """The options that it was made with, and the dtype that it chose."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name in OPTIONS}
        return replace(self.options, **own | {"dtype": self.dtype.name, "mesh": self.mesh_config})

    def check(self, config: GenerationConfig) -> None:
        """Raise `InputError` for settings that can't run with these options."""
        if config.window_size is not None and self.attention_backend not in WINDOWED_BACKENDS:
            raise InputError(
                f"window_size={config.window_size}: attention_backend={self.attention_backend} has no windows; "
                "use auto, or leave out the window"
            )

    def denoiser_mesh(self, traced: TracedModule, heads: int, rules: Sequence[Rule]) -> Mesh:
        """The user's layout; else the tokens over the devices, where `traced` can split them, or heads and widths by `rules`.

        Where tokens are split, blocks' weights are too (`TracedModule.fsdp`), if copies on every device would take more than
        `REPLICATED` of its memory. Raises `InputError` for a layout that this model or these devices can't have.
        """
        structs = traced.parameters(self.dtype)
        config = self.mesh_config or default_mesh_config(
            len(self.devices), {heads, *split_sizes(structs, rules)}, guidance=True, tokens=traced.splits_tokens
        )
        if config.sp > 1 and not traced.splits_tokens:
            raise InputError(f"mesh sp={config.sp}: this model can't split its tokens; use tp")
        memory = device_memory(self.devices[0])
        size = sum(math.prod(struct.shape) * struct.dtype.itemsize for struct in structs.values())
        automatic = memory is not None and size > REPLICATED * memory
        traced.fsdp = config.sp > 1 and (automatic if config.fsdp is None else config.fsdp)
        return make_mesh(config, self.devices)

    def encoder_mesh(self, sizes: Iterable[int]) -> Mesh:
        """A text encoder's mesh: as many devices as divide `sizes`, or this machine's CPU; `InputError` where it has none."""
        if self.text_encoder_device == "cpu":
            return make_mesh(MeshConfig(), _cpu())
        return make_mesh(default_mesh_config(len(self.devices), sizes), self.devices)

    @property
    def text_encoder_shares_memory(self) -> bool:
        """Whether the text encoder's weights stand in the memory of the accelerator that denoises."""
        return self.text_encoder_device == "device" and self.devices[0].platform != "cpu"

    @contextmanager
    def scope(self, mesh: Mesh) -> Iterator[None]:
        """Within it, functions are traced for `mesh`, and float32 means float32 on every platform."""
        precision = "highest" if self.dtype == np.float32 else None
        elsewhere = mesh.devices.flat[0].platform != self.devices[0].platform  # the text encoder on the CPU
        try:
            with ExitStack() as entered:
                entered.enter_context(placed_on(mesh, "auto" if elsewhere else self.attention_backend))
                entered.enter_context(tables_in_use(plugin_tables()))
                entered.enter_context(jax.default_matmul_precision(precision))
                yield
        except ValueError as error:
            if "attention backend" in str(error):
                raise InputError(str(error)) from None
            raise

    def put(self, tree: Any, sharding: NamedSharding) -> Any:
        """Host arrays onto the devices."""
        return jax.device_put(tree, sharding)

    def fetch(self, tree: Any) -> Any:
        """Device arrays back to the host, once they are computed."""
        return jax.device_get(tree)

    def programs(self, mesh: Mesh, *, effort: float | None = None) -> Programs:
        """Programs for the functions of a stage; `effort` (−1 … 1) is what a TPU's compiler spends on fast ones, None its own
        choice."""
        return Programs(self, mesh, effort)


@runtime_checkable
class Program(Protocol):
    """A compiled function."""

    @property
    def out_info(self) -> Any:
        """A tree of its results' shapes, dtypes and shardings."""

    def __call__(self, *args: Any) -> Any: ...


class Programs:
    """The compiled functions of one stage: each is compiled ahead of time, once for every set of argument shapes."""

    def __init__(self, runtime: Runtime, mesh: Mesh, effort: float | None = None):
        self._runtime, self._mesh = runtime, mesh
        self._options = _compiler_options(mesh.devices.flat[0].platform, effort)
        self._compiled: dict[tuple[Hashable, ...], Program] = {}
        self._doing = "compile"

    def get(
        self, what: str, function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = (), variant: Hashable = None
    ) -> Program:
        """`function` compiled for arguments like `args` (arrays or shape structs); compiling is a phase of its own.

        `variant`: what `function` is traced for beside the shapes of `args`.
        """
        current().note_also("devices", describe_mesh(self._mesh))
        leaves, structure = jax.tree.flatten(args)
        key = (what, variant, structure, tuple((leaf.shape, np.dtype(leaf.dtype)) for leaf in leaves))
        if key not in self._compiled:
            program = self._from_pack(self._runtime.pack, what, args) if self._runtime.pack else None
            if program is None:
                how = [what, repr(variant), donate, self._options]
                program = self._runtime.kept.get(how, args, self._mesh, partial(self._made, what, function, donate, args))
            self._compiled[key] = program
        return self._compiled[key]

    def _made(self, what: str, function: Callable[..., Any], donate: tuple[int, ...], args: tuple[Any, ...]) -> Program:
        with current().phase(f"{self._doing} {what}"), self._runtime.scope(self._mesh):
            return self._compile(what, jax.jit(function, donate_argnums=donate), args)

    def _from_pack(self, pack: Pack, what: str, args: tuple[Any, ...]) -> Program | None:
        """The program as the pack has it; None, with a note of why, where it is to be compiled: better late than not at all."""
        progress = current()
        found = pack.find(what, signature(args, self._mesh))
        if found is None:
            progress.note_also("compiled beside the pack", f"{what} (not in it for these shapes)")
            return None
        try:
            with progress.phase(f"load {what} from pack"):
                program = pack.load(found, args, self._mesh)
        except TpuvidError:
            raise
        except Exception as error:  # whatever a backend has against an executable whose every field fits
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            progress.note_also("compiled beside the pack", f"{what} (can't be loaded here: {reason})")
            return None
        progress.note_also("loaded from pack", what)
        return program

    def _compile(self, what: str, function: jax.stages.Wrapped, args: tuple[Any, ...]) -> Program:
        with TRACING:
            lowered = function.lower(*args)
        return lowered.compile(self._options)


def _compiler_options(platform: str, effort: float | None) -> dict[str, Any] | None:
    match platform:
        case "tpu":
            return TPU_OPTIONS | ({} if effort is None else {"exec_time_optimization_effort": effort})
        case "cpu" if not jax.config.read("jax_disable_most_optimizations"):
            return CPU_OPTIONS
    return None


def device_memory(device: jax.Device) -> int | None:
    """Bytes that programs may use; of a TPU as is known of its kind, so that a plan decides as the run will. None: unknown."""
    chip = next((chip for chip in CHIPS if chip.device_kind == device.device_kind), None)
    if chip is not None:
        return int(chip.usable_gib * 2**30)
    return (device.memory_stats() or {}).get("bytes_limit")


def _cpu() -> Sequence[jax.Device]:
    try:
        return jax.local_devices(backend="cpu")
    except RuntimeError:
        raise InputError(
            "text_encoder_device=cpu: JAX_PLATFORMS leaves out the CPU; add it (JAX_PLATFORMS=tpu,cpu) or unset it"
        ) from None


def describe_mesh(mesh: Mesh) -> str:
    """The mesh, for the record: "8 × TPU v6 lite, dp=2, tp=4"."""
    axes = "".join(f", {axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    return f"{mesh.size} × {mesh.devices.flat[0].device_kind}{axes}"


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh, batch: int) -> NamedSharding:
    """Split over dp along the first dimension, where dp divides the batch."""
    return NamedSharding(mesh, PartitionSpec("dp") if batch % mesh.shape["dp"] == 0 else PartitionSpec())
