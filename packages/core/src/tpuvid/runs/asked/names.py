"""What the videos of a request are called."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tpuvid.contract.settings import GenerationConfig
from tpuvid.errors import InputError
from tpuvid.runs.asked.items import Item
from tpuvid.runs.kept.work import Manifest


def names_of(
    items: Sequence[Item],
    configs: Sequence[GenerationConfig],
    keys: Sequence[str],
    manifest: Manifest | None,
    *,
    with_prompt: bool,
) -> list[str]:
    """The name of each item's mp4. Those of a batch stay what they were, whatever is added to it.

    Raises `InputError` for two that would be the same video, or have the same name.
    """
    first: dict[str, Item] = {}
    for item, key in zip(items, keys, strict=True):
        if key in first:
            raise InputError(
                f"{item.where or 'sweep'}: has the prompt, the seed and all settings of "
                f"{first[key].where or 'another one'}, and would be the same video; change the seed, or leave it out"
            )
        first[key] = item
    if manifest is None:
        return [f"{_stem(configs[0], {}, with_prompt)}_{time.strftime('%Y%m%d-%H%M%S')}.mp4"]
    names = [item.output or _stem(config, item.swept, with_prompt) for item, config in zip(items, configs, strict=True)]
    names = [name if name.endswith(".mp4") else f"{name}.mp4" for name in names]
    times = Counter(names)
    for item, name in zip(items, names, strict=True):
        if item.output and times[name] > 1:
            raise InputError(f"{item.where}: output={item.output!r}: is the name of two videos; give each its own")
    own = manifest.names()
    taken = set(own.values())
    found = []
    for item, name, key in zip(items, names, keys, strict=True):
        if key in own and not item.output:
            name = own[key]
        elif not item.output and (times[name] > 1 or name in taken):
            name = f"{name[:-4]}_{key[:6]}.mp4"
        found.append(name)
    return found


def _stem(config: GenerationConfig, values: Mapping[str, Any], with_prompt: bool) -> str:
    """Prompt, seed and what was swept: "a-red-circle_42_guidance-scale-4.0"."""
    words = [said_of(config.prompt, with_prompt), str(config.seed)]
    words += [f"{name}-{value}" for name, value in values.items() if name != "seed"]
    return "_".join("".join(c if c.isalnum() or c in ".-" else "-" for c in word.replace("_", "-")) for word in words)


def said_of(prompt: str, with_prompt: bool) -> str:
    """What a name says of a prompt, where it may."""
    return slug(prompt) if with_prompt else "video"


def slug(prompt: str) -> str:
    """What of a prompt a file name can hold: lower-case ASCII letters, digits and hyphens, 60 at most."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "video"
