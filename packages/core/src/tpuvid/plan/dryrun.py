"""`generate` without computing: a runtime whose programs are compiled for its devices and never run.

The stages run as they are. Where an array would stand on a device, an `AbsentArray` says its shape, dtype and sharding;
calling a program counts the call and gives the absent arrays that it would return. So what is compiled is what `generate`
compiles, how often each program runs is what the loops do, and the arrays alive at each call are those that would take memory.
"""

from __future__ import annotations

import gc
import itertools
import math
import re
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from tpuvid.compute.lock import TRACING
from tpuvid.compute.mesh import layout_of
from tpuvid.compute.runtime import Program, Programs, Runtime
from tpuvid.compute.stage_loader import open_stage
from tpuvid.contract.layout import MeshConfig
from tpuvid.contract.loop import Loop
from tpuvid.contract.models import ModelSpec
from tpuvid.contract.settings import GenerationConfig
from tpuvid.contract.stages import STAGES
from tpuvid.files.checkpoint import Checkpoint, ConfigsOnly
from tpuvid.plan.bundles import Grid, pallas_grids

OUT_OF_HBM = re.compile(r"HLO temporaries \(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm")
"""What libtpu says it would need, arguments included."""
PROMPT = 'a sign that says "tpuvid"'
"""The prompt of dry runs. It quotes a word, since HunyuanVideo's second text encoder runs for nothing else; prompts are
padded, so that any other gives the same programs."""
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class AbsentArray:
    """The shape, dtype and sharding of an array that would stand on the devices."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding, ledger: Ledger, nbytes: int | None = None):
        """`nbytes` per device, where it is known better than from the shape: tiled layouts pad."""
        self.shape, self.dtype, self.sharding, self._ledger = tuple(shape), np.dtype(dtype), sharding, ledger
        self.nbytes = device_bytes(self.shape, self.dtype, sharding) if nbytes is None else nbytes
        ledger.add(self)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> AbsentArray:
        shape = jax.eval_shape(lambda x: x[index], jax.ShapeDtypeStruct(self.shape, self.dtype)).shape
        share = self.nbytes * math.prod(shape) // max(math.prod(self.shape), 1)
        return AbsentArray(shape, self.dtype, self.sharding, self._ledger, share)

    @property
    def struct(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self.sharding)


def device_bytes(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding) -> int:
    return math.prod(sharding.shard_shape(tuple(shape))) * np.dtype(dtype).itemsize


class Ledger:
    """The absent arrays that are alive."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._alive: weakref.WeakValueDictionary[int, AbsentArray] = weakref.WeakValueDictionary()

    def add(self, array: AbsentArray) -> None:
        self._alive[next(self._numbers)] = array

    def array(self, like: Any, sharding: Sharding) -> AbsentArray:
        """An absent array for something with a shape and a dtype."""
        return AbsentArray(like.shape, like.dtype, sharding, self)

    def bytes(self, without: Iterable[Any] = ()) -> int:
        """The bytes per device of all arrays that are alive but those `without`."""
        left_out = {id(array) for array in without}
        return sum(array.nbytes for array in self._alive.values() if id(array) not in left_out)


@dataclass
class Footprint:
    """Bytes per device that a program takes while it runs."""

    arguments: int
    outputs: int
    aliased: int
    """The part of the outputs that takes the place of arguments."""
    temporary: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporary + self.code


@dataclass
class DryProgram:
    """One program and what is known of its runs. Callable like the program."""

    stage: str
    name: str
    mesh: Mesh
    ledger: Ledger
    arguments: tuple[Any, ...]
    """Shape structs, or host arrays."""
    out_info: Any
    grids: dict[str, list[Grid]] = field(default_factory=dict)
    """The grids of its Pallas kernels, by name."""
    compiled: jax.stages.Compiled | None = None
    """The compiled program; None where its stage isn't compiled, or where the compiler found that it doesn't fit."""
    needed: int | None = None
    """Bytes per device that the compiler asked for where it doesn't fit."""
    compile_seconds: float = 0.0
    """The seconds to compile, tracing and lowering included."""
    calls: int = 0
    around: int = 0
    """Most bytes per device of other arrays that were alive at a call."""

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        self.around = max(self.around, self.ledger.bytes(without=jax.tree.leaves(args)))
        infos = jax.tree.leaves(self.out_info)
        sizes = [device_bytes(info.shape, info.dtype, self._sharding(info)) for info in infos]
        actual = self.footprint.outputs if self.footprint else sum(sizes)
        arrays = [
            AbsentArray(info.shape, info.dtype, self._sharding(info), self.ledger, size * actual // max(sum(sizes), 1))
            for info, size in zip(infos, sizes, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(self.out_info), arrays)

    def _sharding(self, info: Any) -> Sharding:
        sharding = getattr(info, "sharding", None)
        return jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec()) if sharding is None else sharding

    @property
    def footprint(self) -> Footprint | None:
        if self.compiled is None:
            return None
        m: Any = self.compiled.memory_analysis()  # what a backend gives; no type says it
        return Footprint(
            arguments=m.argument_size_in_bytes,
            outputs=m.output_size_in_bytes,
            aliased=m.alias_size_in_bytes,
            temporary=m.temp_size_in_bytes,
            code=m.generated_code_size_in_bytes,
        )

    @property
    def peak(self) -> int:
        """Bytes per device while it runs, with all else that stands there."""
        footprint = self.footprint
        if footprint is not None:
            return self.around + footprint.total
        assert self.needed is not None, "it is compiled, or it doesn't fit"
        return self.around + self.needed


class DryPrograms(Programs):
    def __init__(self, runtime: DryRuntime, mesh: Mesh, effort: float | None = None):
        super().__init__(runtime, mesh, effort)
        self._dry = runtime
        if runtime.stage not in runtime.compiled_stages:
            self._doing = "trace"

    def get(self, what: str, function: Callable[..., Any], *args: Any, **how: Any) -> Program:
        structs = jax.tree.map(lambda x: x.struct if isinstance(x, AbsentArray) else x, args)
        return super().get(what, function, *structs, **how)

    def _compile(self, what: str, function: jax.stages.Wrapped, args: tuple[Any, ...]) -> DryProgram:
        runtime, start = self._dry, time.perf_counter()
        if runtime.stage not in runtime.compiled_stages:
            with TRACING:
                out = function.trace(*args).out_info
            return DryProgram(runtime.stage, what, self._mesh, runtime.ledger, args, out_info=out)
        with TRACING:
            traced = function.trace(*args)
            lowered = traced.lower()
        grids = pallas_grids(traced.jaxpr)
        program = DryProgram(runtime.stage, what, self._mesh, runtime.ledger, args, out_info=lowered.out_info, grids=grids)
        try:
            program.compiled = lowered.compile(self._options)
            program.out_info = program.compiled.out_info
        except jax.errors.JaxRuntimeError as error:
            program.needed = _needed_hbm(str(error))
            if program.needed is None:
                raise
        program.compile_seconds = time.perf_counter() - start
        runtime.on_program(program)
        return program


def _needed_hbm(message: str) -> int | None:
    """Bytes that the compiler says a program would use, from its error."""
    found = OUT_OF_HBM.search(message)
    if not found:
        return None
    number, unit = (group for group in found.groups() if group)
    return int(float(number) * UNITS[unit])


@dataclass(frozen=True)
class DryRuntime(Runtime):
    stage: str = ""
    """The stage that runs with it."""
    compiled_stages: tuple[str, ...] = tuple(STAGES)
    """The stages that are compiled; programs of the others are traced for the shapes that they return."""
    ledger: Ledger = field(default_factory=Ledger)
    on_program: Callable[[DryProgram], None] = lambda program: None
    """Called with each program once it is compiled."""

    def put(self, tree: Any, sharding: Sharding) -> Any:
        return jax.tree.map(lambda x: self.ledger.array(x, sharding), tree)

    def fetch(self, tree: Any) -> Any:
        """Zeros that take no memory."""
        return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), tree)

    def programs(self, mesh: Mesh, *, effort: float | None = None) -> DryPrograms:
        return DryPrograms(self, mesh, effort)


def configs_checkpoint(spec: ModelSpec, checkpoint: Checkpoint, place: Callable[[Any, Any], Any]) -> ConfigsOnly:
    """The configs of what `resolve_model` gave, with absent weights that `place` makes: a registered model's from its
    package, so that nothing is fetched; any other's from its folder or repository, which are the ones it runs with.

    Raises `InputError` where one is missing.
    """
    folder, repo_id = checkpoint.folder, checkpoint.repo_id
    if spec.configs and repo_id == spec.checkpoint:
        package, _, inner = spec.configs.partition(":")
        folder, repo_id = Path(str(files(package))) / inner, None
    found = ConfigsOnly(checkpoint.model_id, folder=folder, repo_id=repo_id, place=place)
    for components in spec.components.values():
        found.require(components)
    return found


class Loaded(NamedTuple):
    weights: int
    """Bytes per device."""
    layout: MeshConfig | None


def dry_generate(
    spec: ModelSpec, checkpoint: ConfigsOnly, config: GenerationConfig, runtime: DryRuntime, *, until: str = "decode"
) -> dict[str, Loaded]:
    """Run `generate`'s three stages one after the other, freeing each, as far as the last that is to be compiled.

    Where none is, as far as `until`.

    Returns what is known of each stage that ran; programs go to ``runtime.on_program``.
    """
    runtime.check(config)
    loaded, value = {}, None
    order = list(STAGES)
    last = max((order.index(stage) for stage in runtime.compiled_stages), default=order.index(until))
    for name in order[: last + 1]:
        stage = open_stage(spec, name, checkpoint, replace(runtime, stage=name))
        before = runtime.ledger.bytes()
        stage.load()
        weights = runtime.ledger.bytes() - before
        match name:
            case "encode":
                value = stage.encode(config, negative=config.do_classifier_free_guidance)
            case "denoise":
                value = stage.denoise(value, stage.resolve(config), Loop(seeds=(config.seed,)))
            case "decode":
                for _ in stage.decode(value):
                    pass
        loaded[name] = Loaded(weights, layout_of(stage))
        del stage
        gc.collect()  # a stage may refer to itself
    return loaded
