"""Packs: the compiled programs of all stages in one file, so that `generate` starts without compiling.

A pack is a safetensors file: one uint8 tensor per program, and JSON in its header about all of them. Reading it, checking it
and comparing it with a run (`read_pack`, `Pack.check`) is reading data. Only `Pack.load` gives a program's bytes to JAX,
which unpickles them and makes machine code of them; it refuses unless the user has said that the file is trusted.

    tensor "0", "1", …   what `jax.experimental.serialize_executable` makes of a program, zlib-compressed
    header "tpuvid_pack" {"format", "made_by", "digest" (of the other two)}
    header "key"         {field: value}: all that programs depend on, see `run_key`
    header "programs"    [{"tensor", "stage", "name", "signature", "arguments", "out_tree", "sha256", "bytes"}]

Imports neither jax nor torch before a run's own fields are asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpuvid.errors import InputError
from tpuvid.stepcache import step_cache

if TYPE_CHECKING:
    import jax
    import numpy as np
    from jax.sharding import Mesh

    from tpuvid.runtime import Runtime
    from tpuvid.stages import GenerationConfig, ModelSpec

FORMAT = 1
HEADER = "tpuvid_pack"
COMPRESSION = 1
"""zlib's level: Wan 2.1 14B's programs for a v6e-8 shrink as docs/packs.md says; higher levels gain little and take long."""

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
    "artifacts", "builtin", "checkpoint", "cli", "compare", "describe", "doctor", "errors", "hookspecs", "lora", "options", "packs",
    "pipeline", "profiling", "progress", "registry", "stages", "video", "weights",
}  # fmt: skip
APART_FOLDERS = {"plan", "plugin", "testing"}
"""Modules of tpuvid whose code enters no program; any other's change makes a pack another's."""
BOOKKEEPING = re.compile(
    r"_.*|architectures|chunk_size_feed_forward|dtype|id2label|initializer_.*|is_decoder|is_encoder_decoder|label2id|name_or_path"
    r"|output_.*|problem_type|return_dict|task_specific_params|tie_.*|tokenizer_class|torch_dtype|transformers_version|use_cache"
    r"|.*dropout.*|.*_token_id"
)
"""Of configs: what enters no program. Which weights are tied shows in the arguments."""


@dataclass(frozen=True)
class PackedProgram:
    """What a pack says of one program."""

    tensor: str
    stage: str
    name: str
    signature: str
    """See `signature`."""
    arguments: str
    """Shapes of what it takes beside the parameters, for people."""
    out_tree: Any
    """See `tree_to_json`."""
    sha256: str
    """Of the compressed bytes."""
    bytes: int
    """Compressed."""


@dataclass(frozen=True)
class Pack:
    """A pack that has been found complete and undamaged. Made by `read_pack`."""

    path: Path
    key: Mapping[str, Any]
    programs: tuple[PackedProgram, ...]
    made_by: str
    trusted: bool = False

    def check(self, run: Mapping[str, Any]) -> None:
        """Raise `InputError` naming the fields of `run` (of `run_key`) in which this pack is for another one."""
        differ = {}
        for name, value in run.items():
            found = _difference(name, self.key.get(name), value)
            if found is not None:
                differ[name] = found
        if not differ:
            return
        incurable = (name for name, (_, theirs, _) in differ.items() if _remedy(name, theirs) == AGAIN)
        name = next(incurable, next(iter(differ)))
        label, theirs, ours = differ.pop(name)
        others = f" ({', '.join(differ)} differ too)" if differ else ""
        raise InputError(
            f"{self.path}: was made for {label}={_short(theirs)}, this run has {label}={_short(ours)}{others}; "
            f"{_remedy(name, theirs)}"
        )

    def require_trust(self) -> None:
        """Raise `InputError` unless the user has said that this file is trusted."""
        if not self.trusted:
            raise InputError(
                f"{self.path}: holds compiled code, which would run on this machine with your rights; nothing else was found against it so far; "
                "add --trust-pack if you made it or trust who did"
            )

    def find(self, name: str, signature: str) -> PackedProgram | None:
        return next((p for p in self.programs if p.name == name and p.signature == signature), None)

    def load(self, program: PackedProgram, args: tuple[Any, ...], mesh: Mesh) -> jax.stages.Compiled:
        """The program, ready to run on the devices of `mesh` with arguments like `args`.

        Unpickles and loads machine code: raises `InputError` before that unless the pack is trusted and the bytes are those
        that were written.
        """
        import jax
        from jax.experimental.serialize_executable import deserialize_and_load

        self.require_trust()
        devices = tuple(mesh.devices.flat)
        in_tree = jax.tree.structure((args, {}))
        try:
            payload = zlib.decompress(_payload(self.path, program))
            out_tree = jax.tree.structure(tree_from_json(program.out_tree))
        except (zlib.error, ValueError):
            raise InputError(f"{self.path}: {program.name!r} is damaged; make or fetch the pack again") from None
        return deserialize_and_load(payload, in_tree, out_tree, backend=devices[0].client, execution_devices=devices)


def read_pack(path: str | Path, *, trusted: bool = False) -> Pack:
    """Read and check a pack; nothing in it is run. Raises `InputError` if it is missing, foreign or damaged in any part."""
    from safetensors import safe_open

    from tpuvid.checkpoint import readable_safetensors

    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give a pack, as tpuvid compile writes it")
    with readable_safetensors(path), safe_open(path, framework="numpy") as file:
        metadata, tensors = file.metadata() or {}, set(file.keys())
    if HEADER not in metadata:
        raise InputError(f"{path}: is no pack; give a file that tpuvid compile has written")
    damaged = InputError(f"{path}: its header is damaged; make or fetch the pack again")
    try:
        header = json.loads(metadata[HEADER])
        if header["format"] != FORMAT:
            raise InputError(
                f"{path}: has format {header['format']}, this tpuvid reads format {FORMAT}; make it again with tpuvid compile"
            )
        if header["digest"] != _digest(metadata["key"], metadata["programs"]):
            raise damaged
        key = json.loads(metadata["key"])
        programs = tuple(PackedProgram(**program) for program in json.loads(metadata["programs"]))
        if not isinstance(key, dict) or not isinstance(key.get("configs", {}), dict):
            raise damaged
        made_by = str(header["made_by"])
    except (KeyError, TypeError, ValueError):
        raise damaged from None
    if {program.tensor for program in programs} != tensors:
        raise damaged
    for program in programs:
        _payload(path, program)
    return Pack(path, key, programs, made_by, trusted)


def _payload(path: Path, program: PackedProgram) -> memoryview:
    """The compressed bytes of one program, found to be those that were written."""
    from safetensors import safe_open

    from tpuvid.checkpoint import readable_safetensors

    with readable_safetensors(path), safe_open(path, framework="numpy") as file:
        data = memoryview(file.get_tensor(program.tensor)).cast("B")
    if hashlib.sha256(data).hexdigest() != program.sha256:
        raise InputError(f"{path}: {program.name!r} is damaged (its checksum differs); make or fetch the pack again")
    return data


class PackWriter:
    """Collects programs, compressed; `write` makes the file."""

    def __init__(self) -> None:
        self.programs: list[PackedProgram] = []
        self._tensors: dict[str, np.ndarray] = {}

    def add(self, stage: str, name: str, compiled: jax.stages.Compiled, args: tuple[Any, ...], mesh: Mesh) -> PackedProgram:
        """A program compiled for arguments like `args`; raises `TypeError` for results that are no trees of plain containers."""
        import jax
        import numpy as np
        from jax.experimental.serialize_executable import serialize

        payload, _, out_tree = serialize(compiled)
        data = zlib.compress(payload, COMPRESSION)
        program = PackedProgram(
            tensor=str(len(self.programs)),
            stage=stage,
            name=name,
            signature=signature(args, mesh),
            arguments=", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(args[1:])),
            out_tree=tree_to_json(jax.tree.unflatten(out_tree, range(out_tree.num_leaves))),
            sha256=hashlib.sha256(data).hexdigest(),
            bytes=len(data),
        )
        self._tensors[program.tensor] = np.frombuffer(data, np.uint8)
        self.programs.append(program)
        return program

    def write(self, path: Path, key: Mapping[str, Any]) -> None:
        """To a path of the caller's own: not atomic."""
        from safetensors.numpy import save_file

        fields, programs = json.dumps(key), json.dumps([asdict(program) for program in self.programs])
        header = {"format": FORMAT, "made_by": f"tpuvid {version('tpuvid-core')}", "digest": _digest(fields, programs)}
        save_file(self._tensors, path, {HEADER: json.dumps(header), "key": fields, "programs": programs})


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


# What a program is for


def signature(args: tuple[Any, ...], mesh: Mesh) -> str:
    """A hash of the mesh and of the arguments' tree, shapes, dtypes, and which device holds which part of each.

    `args` are arrays or shape structs.
    """
    import jax

    leaves, structure = jax.tree.flatten(args)
    devices = [device.id for device in mesh.devices.flat]
    digest = hashlib.sha256(f"{dict(mesh.shape)} {devices} {structure}".encode())
    for leaf in leaves:
        digest.update(f"{leaf.dtype}{tuple(leaf.shape)}{_layout(getattr(leaf, 'sharding', None), tuple(leaf.shape))}".encode())
    return digest.hexdigest()


@lru_cache(maxsize=4096)
def _layout(sharding: Any, shape: tuple[int, ...]) -> str:
    """Device by device, the part of an array that it holds; "host" for what stands on no device yet."""
    if sharding is None:
        return "host"
    parts = sharding.devices_indices_map(shape)
    return str([(d.id, [s.indices(n) for s, n in zip(parts[d], shape)]) for d in sorted(parts, key=lambda d: d.id)])


def tree_to_json(tree: Any) -> Any:
    """A tree of tuples, lists, dicts and None as JSON-ready data; raises `TypeError` for other containers."""
    if tree is None:
        return None
    if type(tree) in (tuple, list):
        return {type(tree).__name__: [tree_to_json(value) for value in tree]}
    if type(tree) is dict and all(type(name) in (str, int) for name in tree):
        return {"dict": [[name, tree_to_json(value)] for name, value in tree.items()]}
    if type(tree) is int:
        return "array"
    raise TypeError(f"a program that returns a {type(tree).__name__} can't be packed; return tuples, lists or dicts")


def tree_from_json(data: Any) -> Any:
    """A tree of the same form, with 0 for each array; raises `ValueError` for other data."""
    match data:
        case None:
            return None
        case "array":
            return 0
        case {"tuple": list(values)}:
            return tuple(map(tree_from_json, values))
        case {"list": list(values)}:
            return list(map(tree_from_json, values))
        case {"dict": list(items)}:
            return {name: tree_from_json(value) for name, value in items}
    raise ValueError(f"{data!r} describes no tree")


# What all programs depend on


def run_key(spec: ModelSpec, stages: Mapping[str, Any], config: GenerationConfig, runtime: Runtime) -> dict[str, Any]:
    """All that the programs of `stages` (opened, by "encode", "denoise", "decode") depend on, field by field, JSON-ready.

    Not in it, since no program depends on it: prompt, seed, number of steps (two or more), guidance scale (only whether there is
    guidance), flow shift, which steps a cache serves, fps, LoRA.
    """
    import jax

    first = runtime.devices[0]
    key = settings_key(spec, config) | {
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
        "matmul_precision": jax.config.jax_default_matmul_precision,
        "x64": jax.dtypes.canonicalize_dtype("float64") == "float64",
        "configs": {name: module_configs(stage) for name, stage in stages.items()},
        **{name: _version(name) for name in LIBRARIES if name != "libtpu" or first.platform == "tpu"},
        **{name: " ".join(os.environ.get(name, "").split()) for name in VARIABLES},
        "kernels": _hash_sources("tpuvid.kernels"),
        "block_sizes": _own_block_sizes(),
        "source": source_hash(_packages(spec, config)),
    }
    return {name: value for name, value in key.items() if set(CONCERNS.get(name, STAGES)) & set(stages)}


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


def module_configs(stage: Any) -> list[dict[str, Any]]:
    """The configs of the modules that a stage traces, with their classes' defaults filled in: equal for a full config.json
    and for one that leaves out what it takes as it is."""
    from tpuvid.bridge import TracedModule

    found: list[dict[str, Any]] = []
    for value in vars(stage).values():
        traced = value if isinstance(value, TracedModule) else getattr(value, "traced", None)
        if isinstance(traced, TracedModule):
            module = next((m for m in traced.module.modules() if hasattr(m, "config")), None)
            config = {} if module is None else module.config
            found.append(_plain(config.to_dict() if hasattr(config, "to_dict") else dict(config)))
    if is_dataclass(guidance := getattr(stage, "guidance", None)):  # of HunyuanVideo: its form is traced
        found.append(_plain(asdict(guidance)))
    return found


def _plain(value: Any) -> Any:
    """JSON-ready, without bookkeeping."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if not BOOKKEEPING.fullmatch(str(k))}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


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
        for a, b in zip(theirs[stage], configs):
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


def _version(package: str) -> str | None:
    for name in (package, f"{package}-tpu"):  # diffusers has a fork that answers to the same import
        try:
            return version(name)
        except PackageNotFoundError:
            pass
    return None


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
    return _hash_sources("tpuvid", *families, apart=lambda path: path.parts[0] in APART_FOLDERS or path.stem in APART)


@cache
def _hash_sources(*packages: str, apart: Callable[[Path], bool] = lambda path: False) -> str:
    """Of code and of data tables, whichever the package holds, but not of bundled configs and weights."""
    digest = hashlib.sha256()
    for package in packages:
        spec = find_spec(package)
        root = Path(next(iter(spec.submodule_search_locations or [Path(spec.origin).parent])))
        for path in _sources(root) if spec.submodule_search_locations else [Path(spec.origin)]:
            relative = path.relative_to(root)
            if package == "tpuvid" and apart(relative):
                continue
            digest.update(f"{package}/{relative.as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _sources(root: Path) -> Iterable[Path]:
    """A package's modules and, in a package of kernels, its tables."""
    tables = root.rglob("kernels/**/*.json") if root.name != "kernels" else root.rglob("*.json")
    return sorted([*root.rglob("*.py"), *tables])
