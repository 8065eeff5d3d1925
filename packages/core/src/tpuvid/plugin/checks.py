"""What may be wrong with what a plugin's hooks give. Each check raises, so that what is incomplete isn't registered."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from tpuvid.contract.commands import CommandSpec
from tpuvid.contract.models import API_VERSION, OPTIONAL_FEATURES, Conformance, DecoderSpec, ModelSpec
from tpuvid.contract.settings import OPTIONAL_SETTINGS, GenerationConfig, check_sampling
from tpuvid.contract.sizes import SizeRules
from tpuvid.contract.stepcache import SETTINGS as CACHE_SETTINGS
from tpuvid.contract.stepcache import StepCache

NAME = re.compile(r"[A-Za-z0-9][\w.+-]*", re.ASCII)
LOADER = re.compile(r"[\w.]+:\w+")
COMMAND = re.compile(r"[a-z][a-z0-9-]*", re.ASCII)
OWN_COMMANDS = (
    "compare", "compile", "decode", "denoise", "doctor", "encode", "generate", "inspect", "list-models", "plan", "plugin",
    "reproduce", "tune",
)  # fmt: skip
"""The names of tpuvid-core's commands, which nobody else may give to one."""
OWN = "own"
"""What the model's own decoder is called in lists."""


def _check_kind(hook: str, thing: Any, kind: type) -> None:
    if not isinstance(thing, kind):
        raise TypeError(f"{hook} gave a {type(thing).__name__}, not a {kind.__name__}")


def _check_name(what: str, name: Any) -> None:
    if not (isinstance(name, str) and NAME.fullmatch(name)):
        raise ValueError(f"{what}={name!r} needs letters, digits, '.', '-', '_' or '+'")


def _check_fields(name: str, spec: Any, kinds: Mapping[Any, Iterable[str]]) -> None:
    for kind, names in kinds.items():
        for each in names:
            value = getattr(spec, each)
            if not isinstance(value, kind):
                raise TypeError(f"{name}: {each}={value!r} is no {getattr(kind, '__name__', kind)}")
            if kind is str and not (value and value.isprintable()):
                raise ValueError(f"{name}: {each}={value!r} needs a line of text")
    for each in (f.name for f in fields(spec) if f.name.startswith("load_")):
        if not LOADER.fullmatch(value := getattr(spec, each)):
            raise ValueError(f"{name}: {each}={value!r} is not of the form 'package.module:name'")


def _check_api(name: str, spec: Any) -> None:
    if spec.api_version != API_VERSION or isinstance(spec.api_version, bool):
        raise ValueError(
            f"{name} is built for plugin API {spec.api_version!r}, this tpuvid has {API_VERSION}; update one of them"
        )


def _check_texts(name: str, what: str, values: Any) -> None:
    """A tuple of plain names: of folders, models or families."""
    if not isinstance(values, tuple | list) or not values:
        raise TypeError(f"{name}: {what}={values!r} needs a tuple of names, such as ('vae',)")
    for value in values:
        _check_name(f"{name}: {what}", value)


def _check_model(spec: Any) -> None:
    """Raise unless a `ModelSpec` is complete, and its defaults obey its own rules."""
    _check_kind("tpuvid_models", spec, ModelSpec)
    name = spec.model_id
    _check_name("model_id", name)
    texts = ("family", "pipeline_class", "checkpoint", "parameters", "load_text_encoder", "load_denoiser", "load_decoder")
    _check_fields(
        name,
        spec,
        {
            str: texts,
            Mapping: ("signature", "components"),
            GenerationConfig: ("defaults",),
            SizeRules: ("rules",),
            Conformance | None: ("conformance",),
            str | None: ("configs",),
            type(None): ("twin", "decoder", "step_caches"),  # which tpuvid itself fills in
            tuple: ("takes", "flow_shifts"),
        },
    )
    _check_api(name, spec)
    if set(spec.components) != {"encode", "denoise", "decode"}:
        raise ValueError(f"{name}: components of {sorted(spec.components)}, not of encode, denoise and decode")
    for stage, components in spec.components.items():
        _check_texts(name, f"components[{stage!r}]", components)
    known = OPTIONAL_SETTINGS | OPTIONAL_FEATURES
    if unknown := set(spec.takes) - set(known):
        raise ValueError(f"{name}: takes {sorted(unknown)[0]!r}; choose from {', '.join(known)}")
    for pair in spec.flow_shifts:
        if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(x, int | float) for x in pair)):
            raise TypeError(f"{name}: flow_shifts has {pair!r}, not (pixels, shift)")
    for f in fields(spec.rules):
        if type(value := getattr(spec.rules, f.name)) is not int or value < 1:
            raise ValueError(f"{name}: rules.{f.name}={value!r} needs a whole number ≥ 1")
    _check_defaults(spec)


def _check_defaults(spec: ModelSpec) -> None:
    """All that `ModelSpec.configure` asks of them, but for the name of a step cache, which may be registered later."""
    defaults = spec.defaults
    check_sampling(defaults)
    spec.rules.check(height=defaults.height, width=defaults.width, num_frames=defaults.num_frames)
    for each in OPTIONAL_SETTINGS:
        if getattr(defaults, each) not in (None, False) and each not in spec.takes:
            raise ValueError(f"{spec.model_id}: defaults.{each}={getattr(defaults, each)!r}, which takes doesn't name")


def _check_decoder(decoder: Any) -> None:
    _check_kind("tpuvid_decoders", decoder, DecoderSpec)
    _check_name("decoder", decoder.name)
    if decoder.name == OWN:
        raise ValueError(f"decoder={OWN!r} is the name of every model's own; choose another")
    name = f"decoder {decoder.name!r}"
    _check_fields(name, decoder, {str: ("checkpoint", "load_decoder")})
    _check_api(name, decoder)
    _check_name(f"{name}: component", decoder.component)
    _check_texts(name, "models", decoder.models)


def _check_step_cache(step_cache: Any) -> None:
    if not (isinstance(step_cache, type) and is_dataclass(step_cache) and isinstance(step_cache(), StepCache)):
        raise TypeError(f"tpuvid_step_caches gave {step_cache!r}, not a dataclass with name, full_steps, full and cached")
    named: Any = step_cache
    names = {f.name for f in fields(named)}
    _check_name("step cache", named.name)
    if not names <= set(CACHE_SETTINGS):
        raise TypeError(f"step cache {named.name!r}: its fields are {sorted(names)}; choose from {', '.join(CACHE_SETTINGS)}")


def _check_block_sizes(path: Any) -> None:
    _check_kind("tpuvid_block_sizes", path, Path)
    if not path.is_file():
        raise FileNotFoundError(f"tpuvid_block_sizes gave {path}, which does not exist")
    rows = json.loads(path.read_text("utf-8"))  # what is in them, whoever uses them looks at: that takes jax
    if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise TypeError(f"tpuvid_block_sizes gave {path.name}, which holds no list of rows")


def _check_command(command: Any) -> None:
    _check_kind("tpuvid_commands", command, CommandSpec)
    if not (isinstance(command.name, str) and COMMAND.fullmatch(command.name)):
        raise ValueError(f"command={command.name!r} needs lower-case letters, digits and hyphens")
    _check_fields(f"command {command.name!r}", command, {str: ("load_command", "help")})
    if command.name in OWN_COMMANDS and not command.load_command.startswith("tpuvid.cli."):
        raise ValueError(f"command={command.name!r} is tpuvid's own; choose another name")


CHECKS = {
    "models": _check_model,
    "decoders": _check_decoder,
    "step_caches": _check_step_cache,
    "block_sizes": _check_block_sizes,
    "commands": _check_command,
}
"""What may go wrong with what each hook gives."""
