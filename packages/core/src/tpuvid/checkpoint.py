"""A diffusers checkpoint, in a local folder or on the Hub: which model it is, and its parts, read one at a time."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes  # noqa: F401  (lets numpy, and so safetensors, know bfloat16)
import numpy as np

from tpuvid.errors import InputError, TpuvidError
from tpuvid.registry import registry
from tpuvid.stages import ModelSpec
from tpuvid.untrusted import check_code, check_config, check_header, check_links, check_size, parse_json

if TYPE_CHECKING:
    from tpuvid.lora import Lora
    from tpuvid.stages import Conditioning, Latents

INDEX = "model_index.json"
FINGERPRINTED = (".json", ".safetensors", ".model", ".txt", ".jinja")  # configs, weights, tokenizers, chat templates
FINGERPRINT_SAMPLES, FINGERPRINT_BYTES = 256, 64 * 1024  # per file: small files whole, a 10 GB shard in 16 MB
WEIGHTLESS = {
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
    "guider": "guider_config.json",
}
"""Components without weights, and their configs' names."""
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where one model's weights are. A Hub repository is fetched one component at a time, when it is first asked for."""

    model_id: str
    folder: Path | None = None
    repo_id: str | None = None
    loras: tuple[Lora, ...] = ()
    """To be merged into the diffusion model."""
    others: Mapping[str, Checkpoint] = field(default_factory=dict)
    """Components that another checkpoint has, with that one."""

    def component(self, name: str) -> Path:
        """The folder of component `name` ("vae", "scheduler", …); raises `InputError` where it is missing."""
        if name in self.others:
            return self.others[name].component(name)
        path = self.root(f"{name}/*") / name
        if not path.is_dir():
            raise InputError(f"{path}: the checkpoint has no {name!r} folder; download the checkpoint again")
        return path

    def config(self, component: str, file: str = "config.json") -> dict[str, Any]:
        """One JSON file of a component; of a Hub repository, that file alone is fetched."""
        if component in self.others:
            return self.others[component].config(component, file)
        root = self.root(f"{component}/{file}")
        return read_json(root / component / file)

    def root(self, pattern: str) -> Path:
        """The folder, or that of a Hub repository once what matches `pattern` is in it."""
        if self.folder is not None:
            return self.folder
        assert self.repo_id is not None, "a checkpoint is a folder or a repository"
        return _download(self.repo_id, pattern)

    @property
    def source(self) -> str:
        """Where the weights are, for people and for the record."""
        return self.repo_id or str(self.folder)

    def revision(self, component: str) -> str | None:
        """The commit that a Hub repository's component was fetched at; None for a folder."""
        if component in self.others:
            return self.others[component].revision(component)
        if self.repo_id is None:
            return None
        snapshot = self.component(component).parent
        return snapshot.name if snapshot.parent.name == "snapshots" else None

    def fingerprint(self) -> str | None:
        """Tells one local checkpoint from another that has the same shapes, wherever the folder lies.

        A hash of the configs, tokenizers, sizes and samples of all weights; None for a repository, which its id names.
        """
        if self.folder is None:
            return None
        stats = ((path, path.stat()) for path in sorted(self.folder.glob("*/*")) if path.suffix in FINGERPRINTED)
        return _fingerprint(self.folder, tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats))

    def others_record(self) -> dict[str, str]:
        """Of components that another checkpoint has: its fingerprint, or the repository."""
        return {name: other.fingerprint() or other.source for name, other in self.others.items()}

    def lora_record(self) -> list[dict[str, Any]]:
        """The LoRAs, with a hash of each file."""
        return [{"path": str(lora.path), "scale": lora.scale, "sha256": lora.sha256()} for lora in self.loras]

    def require(self, components: tuple[str, ...]) -> None:
        """Raise `InputError` unless each component is there, with its config (and weights, where it has any)."""
        for name in components:
            path = self.component(name)
            check_links(path.parent, path)
            config = path / WEIGHTLESS.get(name, "config.json")
            if name.startswith("tokenizer"):  # whose numbers may be anything
                check_code(config, read_json(config))
            else:
                check_config(config, read_json(config))
            if name not in WEIGHTLESS:
                weight_files(path)

    def read_ahead(self, components: tuple[str, ...]) -> None:
        """Have the system read these components' weights from the disk into its cache, beside whatever is computed."""
        files = [path for name in components if name not in WEIGHTLESS for path in weight_files(self.component(name))]
        threading.Thread(target=_read_ahead, args=(files,), daemon=True).start()

    def weights(self, component: str) -> Weights:
        return Weights(weight_files(self.component(component)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigsOnly(Checkpoint):
    """A checkpoint of which only the configs and tokenizers are read: for planning, with no weights at hand."""

    place: Callable[[Any, Any], Any]
    """(shape struct, sharding) → what stands for a parameter."""

    def require(self, components: tuple[str, ...]) -> None:
        """Raise `InputError` unless each component's config is there."""
        for name in components:
            self.config(name, WEIGHTLESS.get(name, "config.json"))

    def weights(self, component: str) -> UnseenWeights:
        return UnseenWeights(self.place)


def _read_ahead(files: list[Path]) -> None:
    for path in files:
        with suppress(OSError, AttributeError), path.open("rb") as file:  # some systems have no such call
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


@lru_cache(maxsize=8)
def _fingerprint(folder: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    """Of files with their sizes and times of change, by which it is known again without reading."""
    digest = hashlib.sha256()
    for path, size, _ in files:
        digest.update(f"{path.relative_to(folder)} {size} ".encode())
        with path.open("rb") as file:
            for i in range(FINGERPRINT_SAMPLES):
                file.seek(size * i // FINGERPRINT_SAMPLES)
                digest.update(file.read(FINGERPRINT_BYTES))
    return digest.hexdigest()[:32]


def resolve_model(model: str, *, decoder: str | None = None) -> tuple[ModelSpec, Checkpoint]:
    """What `model` means: a registered id, a local diffusers folder, or a Hub id ("owner/name"); with a registered `decoder` in
    the place of its own.

    Raises `InputError` where it is none of them, its family has no plugin, or there is no such decoder for it.
    """
    spec, checkpoint = _resolved(model)
    if decoder is None:
        return spec, checkpoint
    found = registry().decoder(decoder, spec)
    spec = replace(
        spec, decoder=decoder, load_decoder=found.load_decoder, components={**spec.components, "decode": (found.component,)}
    )
    return spec, replace(checkpoint, others={found.component: _registered_checkpoint(decoder, found.checkpoint)})


def _resolved(model: str) -> tuple[ModelSpec, Checkpoint]:
    known = registry()
    if not model:
        raise InputError("model is empty; give a registered id, a diffusers folder or a Hub id")
    if model in known.models:
        spec = known.models[model]
        return spec, _registered_checkpoint(spec.model_id, spec.checkpoint)
    path = Path(model).expanduser()
    try:
        path.exists()
    except (OSError, ValueError) as error:  # too long, or a null byte
        raise InputError(
            f"model {model[:40]!r}…: can't be the name of a folder ({error.args[-1]}); give a shorter one"
        ) from None
    if path.exists() or model.startswith((".", "/", "~")):
        if not path.is_dir():
            problem = "is a file" if path.exists() else "does not exist"
            raise InputError(f"model {model!r} {problem}; give a diffusers folder (with {INDEX}) or a model id")
        check_links(path, path)
        return _identify(Checkpoint(str(path.resolve()), folder=path.resolve()))
    if HUB_ID.fullmatch(model):
        for spec in known.models.values():
            if spec.checkpoint == model:
                return spec, _registered_checkpoint(spec.model_id, spec.checkpoint)
        return _identify(Checkpoint(model, repo_id=model))
    return known.get(model), Checkpoint(model)  # raises: nothing is registered by that name


def check_origin(what: str, made: Conditioning | Latents, spec: ModelSpec, checkpoint: Checkpoint) -> None:
    """Raise `InputError` if a stage's result comes from another checkpoint than the one that is to go on with it."""
    fingerprint = checkpoint.fingerprint() if made.fingerprint else None
    if fingerprint is not None:
        same = made.fingerprint == fingerprint
    else:  # a registered model's files fit a local copy of it; files of earlier tools carry the Hub id, or nothing
        same = made.model_id in ("", spec.model_id, spec.checkpoint, spec.twin)
    if not same:
        raise InputError(
            f"these {what} were made by {made.model_id}, which is another checkpoint than {spec.model_id}; "
            "make them again with this model, or run this stage with that one"
        )


def _registered_checkpoint(name: str, checkpoint: str) -> Checkpoint:
    """Of a `ModelSpec` or a `DecoderSpec`."""
    package, colon, folder = checkpoint.partition(":")
    if colon:
        return Checkpoint(name, folder=Path(str(files(package))) / folder)
    return Checkpoint(name, repo_id=checkpoint)


def _identify(checkpoint: Checkpoint) -> tuple[ModelSpec, Checkpoint]:
    root = checkpoint.root(INDEX)
    index = read_json(root / INDEX)
    pipeline_class = index.get("_class_name")
    if not isinstance(pipeline_class, str):
        raise InputError(f"{root / INDEX}: names no _class_name; it is no diffusers pipeline")
    registry().require_class(pipeline_class)
    spec = registry().match(pipeline_class, checkpoint.config("transformer"))
    needed = {name for components in spec.components.values() for name in components}
    for name, value in index.items():
        component = isinstance(value, list) and value and value[-1] is not None
        if (component and name not in needed) or (not isinstance(value, list) and value and not name.startswith("_")):
            raise InputError(
                f"{root / INDEX}: {name}={value!r} is not supported by {spec.family} yet; this is another variant of the model"
            )
    return replace(spec, model_id=checkpoint.model_id, twin=spec.model_id), checkpoint


def _download(repo_id: str, pattern: str) -> Path:
    """The local snapshot of a Hub repository, holding at least the files of `pattern`; safetensors only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(repo_id, allow_patterns=[pattern], ignore_patterns=["*.bin", "*.pt", "*.pth", "*.msgpack"])
        )
    except HFValidationError:
        raise InputError(f"{repo_id!r} is neither a folder nor a valid Hub id; give one of the form owner/name") from None
    except GatedRepoError:
        raise InputError(f"{repo_id}: is gated; accept its terms on the Hub and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise InputError(f"{repo_id}: is no repository on the Hub (or a private one: set HF_TOKEN)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TpuvidError(
            f"{repo_id}: could not be fetched from the Hub ({reason}); check the network, or give a local folder as --model"
        ) from None


def read_json(path: Path, remedy: str = "download the checkpoint again") -> dict[str, Any]:
    """A JSON object, by default from a checkpoint folder; raises `InputError` for anything else."""
    try:
        check_size(path)
        value = parse_json(path, path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: is missing; {remedy}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is no readable JSON ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}, not a JSON object; {remedy}")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one component, by its index where it has one; raises `InputError` if any is missing."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        weight_map = read_json(indexes[0]).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(f"{indexes[0]}: has no weight_map; download the checkpoint again")
        names = {str(name) for name in weight_map.values()}
        if any(os.path.basename(name) != name or name in ("", ".", "..") for name in names):
            raise InputError(f"{indexes[0]}: names files outside its folder; download the checkpoint again")
        shards = [folder / name for name in sorted(names)]
    else:
        variants = ("model.safetensors", "diffusion_pytorch_model.safetensors")
        shards = [folder / name for name in variants if (folder / name).exists()][:1] or sorted(folder.glob("*.safetensors"))
    if missing := [shard.name for shard in shards if not shard.exists()]:
        raise InputError(f"{folder}: {len(missing)} of {len(shards)} shards are missing ({missing[0]}); download it again")
    if not shards:
        other = next((p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"}), None)
        remedy = (
            f"{other} is a pickle and is not read; convert it with save_pretrained(safe_serialization=True)"
            if other
            else "download it again"
        )
        raise InputError(f"{folder}: holds no .safetensors weights; {remedy}")
    return shards


class Weights(Mapping[str, tuple[int, ...]]):
    """The tensors of one component: a mapping of name → shape, with values read piece by piece from memory-mapped files."""

    def __init__(self, shards: list[Path]):
        from safetensors import safe_open

        self.folder = shards[0].parent
        self._slices: dict[str, Any] = {}
        for shard in shards:
            with readable_safetensors(shard):
                handle = safe_open(shard, framework="numpy")
                slices = {name: handle.get_slice(name) for name in handle.keys()}
            if twice := sorted(self._slices.keys() & slices):
                raise InputError(f"{shard}: holds {twice[0]}, as another shard does; download the checkpoint again")
            self._slices |= slices

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[name].get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def __len__(self) -> int:
        return len(self._slices)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The part `index` of one tensor (all of it by default); only that part enters memory."""
        return self._slices[name][index or ...]


class UnseenWeights(Weights):
    """Weights of which nothing is known but that they will fit; in the place of loading them, `place` is called for each."""

    def __init__(self, place: Callable[[Any, Any], Any]):
        self._slices = {}
        self.place = place


@contextmanager
def readable_safetensors(path: Path) -> Iterator[None]:
    """Check the header of `path`, and turn what goes wrong in opening it as safetensors into an `InputError` with a remedy."""
    from safetensors import SafetensorError

    try:
        check_header(path)
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: does not exist; check the path, or run what makes it") from None
    except SafetensorError as error:
        raise InputError(
            f"{path}: is no complete safetensors file ({error}); it is truncated or foreign: make or fetch it again"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror or error})") from None
