"""What all programs of a run depend on, as a key of named fields: a pack is for one of them. Imports neither jax nor torch
before a run's own fields are asked for."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpuvid.compute.packs.fit import VARIABLES
from tpuvid.compute.stage_loader import loader_of
from tpuvid.compute.step_caches import step_cache
from tpuvid.contract.options import OPTIONS
from tpuvid.contract.settings import PROGRAM_SETTINGS
from tpuvid.contract.stages import STAGES
from tpuvid.contract.table import in_key
from tpuvid.files.sources import sources_hash
from tpuvid.files.versions import LIBRARIES, installed_version

if TYPE_CHECKING:
    from tpuvid.compute.runtime import Runtime
    from tpuvid.compute.traced import TracedModule
    from tpuvid.contract.models import ModelSpec
    from tpuvid.contract.settings import GenerationConfig

CONCERNS = PROGRAM_SETTINGS | {
    "guidance": PROGRAM_SETTINGS["guidance_scale"],
    **{name: each.enters for name, each in OPTIONS.items() if each.programs},
}
"""Fields that only some stages' programs depend on."""
BOOKKEEPING = re.compile(
    r"_.*|architectures|chunk_size_feed_forward|dtype|id2label|initializer_.*|is_decoder|is_encoder_decoder|label2id|name_or_path"
    r"|output_.*|problem_type|return_dict|task_specific_params|tie_.*|tokenizer_class|torch_dtype|transformers_version|use_cache"
    r"|.*dropout.*|.*_token_id"
)
"""The entries of configs that enter no program. Which weights are tied shows in the arguments."""


def run_key(spec: ModelSpec, stages: Mapping[str, Any], config: GenerationConfig, runtime: Runtime) -> dict[str, Any]:
    """All that the programs of `stages` (opened, by "encode", "denoise", "decode") depend on, field by field, JSON-ready.

    Not in it, since no program depends on it: prompt, seed, number of steps (two or more), guidance scale (only whether there
    is guidance), flow shift, which steps a cache serves, fps, LoRA.
    """
    key = settings_key(spec, config) | stages_key(stages, runtime) | {"source": source_hash(_packages(spec, config))}
    return {name: value for name, value in key.items() if set(CONCERNS.get(name, STAGES)) & set(stages)}


def stages_key(stages: Mapping[str, Any], runtime: Runtime) -> dict[str, Any]:
    """The part of `run_key` that doesn't depend on what is asked for, but for tpuvid's own sources."""
    import jax

    first = runtime.devices[0]
    programs = (name for name, each in OPTIONS.items() if each.programs and name != "decoder")
    asked = {name: in_key(getattr(runtime.asked(), name)) for name in programs}
    return {
        **asked,
        "mesh": _layout_text(stages.get("denoise")),
        "platform": first.platform,
        "device_kind": first.device_kind,
        "device_count": len(runtime.devices),
        "device_order": [[d.id, *(getattr(d, "coords", None) or ()), getattr(d, "core_on_chip", 0)] for d in runtime.devices],
        "cpu": _cpu() if first.platform == "cpu" else None,
        "matmul_precision": jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]  # JAX adds its settings at run time
        "x64": jax.dtypes.canonicalize_dtype("float64") == "float64",
        "configs": {name: module_configs(stage) for name, stage in stages.items()},
        **{name: installed_version(name) for name in LIBRARIES if name != "libtpu" or first.platform == "tpu"},
        **{name: " ".join(os.environ.get(name, "").split()) for name in VARIABLES},
        "kernels": sources_hash("tpuvid.compute.kernels"),
        "block_sizes": _own_block_sizes(),
    }


def _packages(spec: ModelSpec, config: GenerationConfig) -> tuple[str, ...]:
    """The packages of the stages and of the step cache."""
    modules = [loader_of(spec, stage).partition(":")[0] for stage in STAGES] + [type(step_cache(config)).__module__]
    return tuple(sorted({module.split(".")[0] for module in modules} - {"tpuvid"}))


def settings_key(spec: ModelSpec, config: GenerationConfig) -> dict[str, Any]:
    """The part of `run_key` that is known before anything is fetched or opened."""
    return {
        "family": spec.family,
        **config.programs_key(),
        "decoder": spec.decoder or "own",
    }


def _own_block_sizes() -> str:
    """A hash of the user's table of tile sizes. Those of model packages may differ: a pack is as fast as where it was made."""
    path = os.environ.get("TPUVID_BLOCK_SIZES")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] if path else "none"


def key_hash(key: Mapping[str, Any]) -> str:
    """Names a key, for people."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def traced_modules(stage: Any) -> list[TracedModule]:
    """The modules that a stage traces, its own and those of its parts."""
    from tpuvid.compute.traced import TracedModule

    found = [value if isinstance(value, TracedModule) else getattr(value, "traced", None) for value in vars(stage).values()]
    return [traced for traced in found if isinstance(traced, TracedModule)]


def module_configs(stage: Any) -> list[dict[str, Any]]:
    """The configs of the modules that a stage traces, with their classes' defaults filled in: equal for a full config.json
    and for one that leaves out what it takes as it is."""
    found = [_plain(traced.config) for traced in traced_modules(stage)]
    guidance = getattr(stage, "guidance", None)  # of HunyuanVideo: its form is traced
    if is_dataclass(guidance) and not isinstance(guidance, type):
        found.append(_plain(asdict(guidance)))
    return found


def _plain(value: Any) -> Any:
    """`value`, JSON-ready, without bookkeeping."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if not BOOKKEEPING.fullmatch(str(k))}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _layout_text(denoiser: Any) -> str | None:
    from tpuvid.compute.mesh import layout_of

    layout = layout_of(denoiser)
    return None if layout is None else str(layout)


@cache
def _cpu() -> str:
    """What XLA compiles for on a CPU: its instruction set."""
    flags = ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    return f"{platform.machine()} {hashlib.sha256(flags.encode()).hexdigest()[:12]}"


@cache
def source_hash(families: tuple[str, ...]) -> str:
    """A hash of the code that programs are traced from: this folder, all of it, and the families' packages."""
    return sources_hash("tpuvid.compute", *families)
