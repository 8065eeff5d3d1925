"""What ``--model`` means: a registered id, a folder or a Hub id, and which plugin runs it."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from tpuvid.contract.models import ModelSpec
from tpuvid.contract.paths import path_of
from tpuvid.errors import InputError
from tpuvid.files.checkpoint import INDEX, Checkpoint
from tpuvid.files.readers import read_json
from tpuvid.files.untrusted import check_links
from tpuvid.plugin.registry import registry

if TYPE_CHECKING:
    from tpuvid.contract.values import Conditioning, Latents

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


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
    path = path_of(model)
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
        if os.path.lexists(path / INDEX):  # else it is no checkpoint, and may be a whole disk
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
    """The checkpoint of a `ModelSpec` or a `DecoderSpec`."""
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
