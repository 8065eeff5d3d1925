"""What is known of a module without having it: enough to load its weights and to run programs that were traced before."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from torch import nn

from tpuvid.files.kept import Entry


class Config(dict[str, Any]):
    """A module's config as JSON has it; entries can be read like attributes, as those of diffusers and transformers."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the config has no entry {name!r}") from None


@dataclass(frozen=True)
class Outline:
    parameters: Mapping[str, tuple[int, ...]]
    """Shapes, by the names that checkpoints use; tied parameters once."""
    sources: Mapping[str, list[str]]
    """The names that each parameter may have: tied ones have several."""
    depths: Mapping[str, int]
    """How many blocks a scanned stack has, by the prefix of its parameters' names."""
    splits_tokens: bool
    buffers: Mapping[str, np.ndarray]
    """RoPE tables and the like, computed by the module's constructor."""
    config: Config
    """The config of the module, or of the first part that has one; entries that JSON can't have are text."""
    facts: Config
    """What the module says of itself in an attribute of that name."""
    words: int | None
    """How many tokens a text encoder embeds."""

    def entry(self, sources: list[ModuleType]) -> Entry:
        about = {
            "parameters": {name: list(shape) for name, shape in self.parameters.items()},
            "sources": dict(self.sources),
            "depths": dict(self.depths),
            "splits_tokens": self.splits_tokens,
            "config": self.config,
            "facts": self.facts,
            "words": self.words,
        }
        return Entry(self.buffers, about, sources)

    @classmethod
    def of_entry(cls, entry: Entry) -> Outline:
        about = dict(entry.about)
        parameters = {name: tuple(shape) for name, shape in about.pop("parameters").items()}
        config, facts = Config(about.pop("config")), Config(about.pop("facts"))
        return cls(parameters=parameters, buffers=entry.arrays, config=config, facts=facts, **about)


def config_of(module: nn.Module) -> Config:
    """See `Outline.config`."""
    owner = next((part for part in module.modules() if hasattr(part, "config")), None)
    config = {} if owner is None else owner.config
    return Config(_plain(config.to_dict() if hasattr(config, "to_dict") else dict(config)))


def words_of(module: nn.Module) -> int | None:
    """See `Outline.words`."""
    try:
        return module.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):  # no text encoder
        return None


def code_of(*modules: nn.Module) -> list[ModuleType]:
    """The Python modules that define the classes of `modules` and of their parts."""
    names = {base.__module__ for module in modules for part in module.modules() for base in type(part).__mro__}
    return [sys.modules[name] for name in sorted(names) if name in sys.modules]


def _plain(value: Any) -> Any:
    """`value`, JSON-ready."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
