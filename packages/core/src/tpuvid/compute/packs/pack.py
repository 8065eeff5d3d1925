"""Packs: the compiled programs of all stages in one file, so that `generate` starts without compiling.

A pack is a safetensors file: one uint8 tensor per program, and JSON in its header about all of them. Reading it, checking it
and comparing it with a run (`read_pack`, `Pack.check`) is reading data. Only `Pack.load` gives a program's bytes to JAX,
which unpickles them and makes machine code of them; it refuses unless the user has said that the file is trusted.

    tensor "0", "1", …   what `jax.experimental.serialize_executable` makes of a program, zlib-compressed
    header "tpuvid_pack" {"format", "made_by", "digest" (of the other two)}
    header "key"         {field: value}: all that programs depend on, see `tpuvid.compute.run_key`
    header "programs"    [{"tensor", "stage", "name", "signature", "arguments", "out_tree", "sha256", "bytes"}]

Imports neither jax nor torch before a run's own fields are asked for.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpuvid.compute.packs.fit import mismatch
from tpuvid.contract.paths import path_of
from tpuvid.errors import InputError

if TYPE_CHECKING:
    import jax
    import numpy as np
    from jax.sharding import Mesh

    from tpuvid.contract.options import Options

FORMAT = 1
HEADER = "tpuvid_pack"
COMPRESSION = 1
"""zlib's level: Wan 2.1 14B's programs for a v6e-8 shrink as docs/packs.md says; higher levels gain little and take long."""


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
    """The hash of the compressed bytes."""
    bytes: int
    """The compressed size."""


@dataclass(frozen=True)
class Pack:
    """A pack that has been found complete and undamaged. Made by `read_pack`."""

    path: Path
    key: Mapping[str, Any]
    programs: tuple[PackedProgram, ...]
    made_by: str
    trusted: bool = False

    def check(self, run: Mapping[str, Any]) -> None:
        """Raise `InputError` naming the fields of `run` (of `tpuvid.compute.run_key`) in which this pack is for another one."""
        if (problem := mismatch(self.key, run)) is not None:
            raise InputError(f"{self.path}: was made for {problem}")

    def require_trust(self) -> None:
        """Raise `InputError` unless the user has said that this file is trusted."""
        if not self.trusted:
            raise InputError(
                f"{self.path}: holds compiled code, which would run on this machine with your rights; "
                "nothing else was found against it so far; "
                "add --trust-pack if you made it or trust who did"
            )

    def find(self, name: str, signature: str) -> PackedProgram | None:
        return next((p for p in self.programs if p.name == name and p.signature == signature), None)

    def load(self, program: PackedProgram, args: tuple[Any, ...], mesh: Mesh) -> jax.stages.Compiled:
        """The program, ready to run on the devices of `mesh` with arguments like `args`.

        Unpickles and loads machine code: raises `InputError` before that unless the pack is trusted and the bytes are those
        that were written.
        """
        self.require_trust()
        try:
            payload = zlib.decompress(_payload(self.path, program))
            tree_from_json(program.out_tree)
        except (zlib.error, ValueError):
            raise InputError(f"{self.path}: {program.name!r} is damaged; make or fetch the pack again") from None
        return deserialized(payload, program.out_tree, args, mesh)


def with_pack(options: Options) -> Options:
    """`options` with the pack that they name read, as `read_pack` does."""
    if options.pack is None or isinstance(options.pack, Pack):
        return options
    return replace(options, pack=read_pack(options.pack, trusted=options.trust_pack))


def read_pack(path: str | Path, *, trusted: bool = False) -> Pack:
    """Read and check a pack; nothing in it is run. Raises `InputError` if it is missing, foreign or damaged in any part."""
    from safetensors import safe_open

    from tpuvid.files.readers import readable_safetensors

    path = path_of(path)
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

    from tpuvid.files.readers import readable_safetensors

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
        """A program compiled for arguments like `args`; raises `TypeError` for results other than trees of plain containers."""
        import jax
        import numpy as np

        payload, out_tree = serialized(compiled)
        data = zlib.compress(payload, COMPRESSION)
        program = PackedProgram(
            tensor=str(len(self.programs)),
            stage=stage,
            name=name,
            signature=signature(args, mesh),
            arguments=", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(args[1:])),
            out_tree=out_tree,
            sha256=hashlib.sha256(data).hexdigest(),
            bytes=len(data),
        )
        self._tensors[program.tensor] = np.frombuffer(data, np.uint8)
        self.programs.append(program)
        return program

    def write(self, path: Path, key: Mapping[str, Any]) -> None:
        """Write the pack to a path of the caller's own: not atomic."""
        from safetensors.numpy import save_file

        fields, programs = json.dumps(key), json.dumps([asdict(program) for program in self.programs])
        header = {"format": FORMAT, "made_by": f"tpuvid {version('tpuvid-core')}", "digest": _digest(fields, programs)}
        save_file(self._tensors, path, {HEADER: json.dumps(header), "key": fields, "programs": programs})


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def serialized(compiled: jax.stages.Compiled) -> tuple[bytes, Any]:
    """A program's bytes, and the tree of its results (see `tree_to_json`); raises `TypeError` as that does."""
    import jax
    from jax.experimental.serialize_executable import serialize

    payload, _, out_tree = serialize(compiled)
    return payload, tree_to_json(jax.tree.unflatten(out_tree, range(out_tree.num_leaves)))


def deserialized(payload: bytes, out_tree: Any, args: tuple[Any, ...], mesh: Mesh) -> jax.stages.Compiled:
    """The program of `serialized`, for arguments like `args` on the devices of `mesh`. It unpickles and loads machine code, so
    the bytes must come from who may run code here."""
    import jax
    from jax.experimental.serialize_executable import deserialize_and_load

    devices = tuple(mesh.devices.flat)
    trees = jax.tree.structure((args, {})), jax.tree.structure(tree_from_json(out_tree))
    return deserialize_and_load(payload, *trees, backend=devices[0].client, execution_devices=devices)


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
    return str(
        [(d.id, [s.indices(n) for s, n in zip(parts[d], shape, strict=True)]) for d in sorted(parts, key=lambda d: d.id)]
    )


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
