"""What all programs of a run depend on, as a key of named fields: a pack is for one of them. Imports neither jax nor torch
before a run's own fields are asked for."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, is_dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpuvid.installed import installed_version
from tpuvid.stepcache import step_cache

if TYPE_CHECKING:
    from tpuvid.bridge import TracedModule
    from tpuvid.runtime import Runtime
    from tpuvid.stages import GenerationConfig, ModelSpec

STAGES = ("encode", "denoise", "decode")
CONCERNS = {
    "height": ("denoise", "decode"),
    "width": ("denoise", "decode"),
    "num_frames": ("denoise", "decode"),
    "max_sequence_length": ("encode", "denoise"),
    "guidance": ("denoise",),
    "cache": ("denoise",),
    "window_size": ("denoise",),
    "mesh": ("denoise",),
    "text_encoder_device": ("encode",),
    "vae_tiling": ("decode",),
    "decoder": ("decode",),
}
"""Fields that only some stages' programs depend on."""
FLAGS = ("height", "width", "num_frames", "max_sequence_length", "cache", "window_size", "mesh", "dtype", "attention_backend",
         "text_encoder_device")  # fmt: skip
"""Fields that a flag of the same name sets."""
LIBRARIES = ("jax", "jaxlib", "libtpu", "torch", "torchax", "diffusers", "transformers")
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")

APART = {
    "artifacts", "builtin", "checkpoint", "cli", "compare", "describe", "doctor", "errors", "hookspecs", "installed",
    "kept", "kept_programs", "leaving", "lora", "options", "packs", "pipeline", "profiling", "progress", "registry",
    "run_key",
    "stages", "video", "weights",
}  # fmt: skip
APART_FOLDERS = {"plan", "plugin", "testing"}
"""Modules of tpuvid whose code enters no program; any other's change makes a pack another's."""
BOOKKEEPING = re.compile(
    r"_.*|architectures|chunk_size_feed_forward|dtype|id2label|initializer_.*|is_decoder|is_encoder_decoder|label2id|name_or_path"
    r"|output_.*|problem_type|return_dict|task_specific_params|tie_.*|tokenizer_class|torch_dtype|transformers_version|use_cache"
    r"|.*dropout.*|.*_token_id"
)
"""Of configs: what enters no program. Which weights are tied shows in the arguments."""


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
    return {
        "mesh": _layout_text(stages.get("denoise")),
        "dtype": runtime.dtype.name,
        "attention_backend": runtime.attention_backend,
        "vae_tiling": "on" if runtime.vae_tiling else "off",
        "text_encoder_device": runtime.text_encoder_device,
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
        "kernels": sources_hash("tpuvid.kernels"),
        "block_sizes": _own_block_sizes(),
    }


def _packages(spec: ModelSpec, config: GenerationConfig) -> tuple[str, ...]:
    """Of the stages and the step cache."""
    modules = [getattr(spec, f"load_{stage}").partition(":")[0] for stage in _LOADED] + [type(step_cache(config)).__module__]
    return tuple(sorted({module.split(".")[0] for module in modules} - {"tpuvid"}))


def settings_key(spec: ModelSpec, config: GenerationConfig) -> dict[str, Any]:
    """The part of `run_key` that is known before anything is fetched or opened."""
    return {
        "family": spec.family,
        "height": config.height,
        "width": config.width,
        "num_frames": config.num_frames,
        "max_sequence_length": config.max_sequence_length,
        "guidance": "on" if config.do_classifier_free_guidance else "off",
        "cache": config.cache or "none",
        "window_size": config.window_size or "none",
        "decoder": spec.decoder or "own",
    }


def _own_block_sizes() -> str:
    """A hash of the user's table of tile sizes. Those of model packages may differ: a pack is as fast as where it was made."""
    path = os.environ.get("TPUVID_BLOCK_SIZES")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] if path else "none"


_LOADED = ("text_encoder", "denoiser", "decoder")


def key_hash(key: Mapping[str, Any]) -> str:
    """Names a key, for people."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def traced_modules(stage: Any) -> list[TracedModule]:
    """The modules that a stage traces, its own and those of its parts."""
    from tpuvid.bridge import TracedModule

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
    """JSON-ready, without bookkeeping."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if not BOOKKEEPING.fullmatch(str(k))}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def mismatch(key: Mapping[str, Any], run: Mapping[str, Any]) -> str | None:
    """In which of its fields `run` differs from what a pack's `key` says, and what to do; None where it fits."""
    differ = {}
    for name, value in run.items():
        found = _difference(name, key.get(name), value)
        if found is not None:
            differ[name] = found
    if not differ:
        return None
    incurable = (name for name, (_, theirs, _) in differ.items() if _remedy(name, theirs) == AGAIN)
    name = next(incurable, next(iter(differ)))
    label, theirs, ours = differ.pop(name)
    others = f" ({', '.join(differ)} differ too)" if differ else ""
    return f"{label}={_short(theirs)}, this run has {label}={_short(ours)}{others}; {_remedy(name, theirs)}"


def _difference(name: str, theirs: Any, ours: Any) -> tuple[str, Any, Any] | None:
    """(what differs, the pack's value, this run's), of one field; None where they agree.

    A config's entry that only one side has is unknown to the module's class, which fills in all that it knows: it is left out.
    """
    if name != "configs":
        return None if theirs == ours else (name, theirs, ours)
    theirs = theirs or {}
    for stage, configs in ours.items():
        if len(theirs.get(stage, ())) != len(configs):
            return f"configs of {stage}", theirs.get(stage), configs
        for a, b in zip(theirs[stage], configs, strict=True):
            for entry in a.keys() & b.keys():
                if a[entry] != b[entry]:
                    return f"configs: {stage}: {entry}", a[entry], b[entry]
    return None


AGAIN = "make a pack for this run with tpuvid compile"


def _remedy(name: str, theirs: Any) -> str:
    if name in FLAGS and theirs not in ("none", None):
        return f"pass --{name.replace('_', '-')} {_flag(theirs)}, or {AGAIN}"
    if name in LIBRARIES and theirs:
        return f"install {name}=={theirs}, or {AGAIN}"
    if name in VARIABLES:
        return f"{f'set {name}={theirs!r}' if theirs else f'unset {name}'}, or {AGAIN}"
    switches = {
        "guidance": {"on": "pass a --guidance-scale above 1", "off": "pass --guidance-scale 1"},
        "vae_tiling": {"on": "pass --vae-tiling", "off": "leave out --vae-tiling"},
        "cache": {"none": "leave out --cache"},
        "window_size": {"none": "leave out --window-size"},
        "decoder": {"own": "leave out --decoder"},
    }
    switch = switches.get(name, {}).get(str(theirs))
    return f"{switch}, or {AGAIN}" if switch else AGAIN


def _flag(value: Any) -> str:
    return str(value).replace(" ", "")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _layout_text(denoiser: Any) -> str | None:
    from tpuvid.mesh import layout_of

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
    """Of the modules of tpuvid that enter programs, and of the families' packages."""
    return sources_hash("tpuvid", *families, apart=lambda path: path.parts[0] in APART_FOLDERS or path.stem in APART)


@cache
def sources_hash(*packages: str, apart: Callable[[Path], bool] = lambda path: False) -> str:
    """Of code and of data tables, whichever the package holds, but not of bundled configs and weights."""
    digest = hashlib.sha256()
    for package in packages:
        root, paths = _package(package)
        for path in paths:
            relative = path.relative_to(root)
            if package == "tpuvid" and apart(relative):
                continue
            digest.update(f"{package}/{relative.as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _package(name: str) -> tuple[Path, Iterable[Path]]:
    """The folder of a package, or of a module, and its files."""
    spec = find_spec(name)
    assert spec is not None, f"{name} has been imported"
    if spec.submodule_search_locations:
        root = Path(next(iter(spec.submodule_search_locations)))
        return root, _sources(root)
    assert spec.origin is not None, f"{name} is a file"
    return Path(spec.origin).parent, [Path(spec.origin)]


def _sources(root: Path) -> Iterable[Path]:
    """A package's modules and, in a package of kernels, its tables."""
    tables = root.rglob("kernels/**/*.json") if root.name != "kernels" else root.rglob("*.json")
    return sorted([*root.rglob("*.py"), *tables])
