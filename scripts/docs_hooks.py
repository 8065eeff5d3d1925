"""What mkdocs does to the pages beside rendering them: tables from the registry, links out of docs/, which the site lacks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import click
from tpuvid.cli.main import cli
from tpuvid.contract import OPTIONAL_SETTINGS
from tpuvid.plugin.loader import Plugin
from tpuvid.plugin.registry import registry

ROOT = Path(__file__).parents[1]
FLAGS = {name: f"`--{name.replace('_', '-')}`" for name in OPTIONAL_SETTINGS} | {"lora": "`--lora-path`"}


def workspace_plugins() -> list[Plugin]:
    """Those of packages/, whatever else is installed here."""
    ours = {path.name for path in (ROOT / "packages").iterdir()}
    plugins = [p for p in registry().plugins if p.package.removeprefix("tpuvid-") in ours]
    if broken := [f"{p.name}: {p.error}" for p in plugins if p.error]:
        raise RuntimeError(f"plugins that do not load: {'; '.join(broken)}")
    return plugins


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def models() -> str:
    """What each registered model is, and its published defaults."""
    rows = []
    for plugin in workspace_plugins():
        for spec in plugin.models:
            d = spec.defaults
            guidance = "its own" if d.guidance_scale is None else f"{d.guidance_scale:g}"
            rows.append([
                f"`{spec.model_id}`", f"`{plugin.package}`", spec.family, spec.parameters, f"{d.width}×{d.height}",
                f"{d.num_frames} at {d.fps}/s", str(d.num_inference_steps), guidance,
            ])  # fmt: skip
    return table(["model", "package", "family", "parameters", "size", "frames", "steps", "guidance"], rows)


def weights() -> str:
    """Where each model's weights come from."""
    rows = []
    for plugin in workspace_plugins():
        for spec in plugin.models:
            where = f"in `{plugin.package}`" if ":" in spec.checkpoint else f"`{spec.checkpoint}`"
            rows.append([f"`{spec.model_id}`", where, f"`{spec.pipeline_class}`"])
    return table(["model", "weights", "pipeline"], rows)


def features() -> str:
    """What each model accepts: sizes, and the settings that only some models have."""
    plugins = workspace_plugins()
    specs = [spec for plugin in plugins for spec in plugin.models]
    caches = " ".join(f"`{c.name}`" for plugin in plugins for c in plugin.step_caches)
    decoders = [d for plugin in plugins for d in plugin.decoders]
    head = ["model", "sizes", "frames", *FLAGS.values()] + ["`--decoder`"] * bool(decoders)
    rows = []
    for spec in specs:
        r = spec.rules
        takes = [(caches if name == "cache" else "yes") if name in spec.takes else "–" for name in FLAGS]
        served = [" ".join(f"`{d.name}`" for d in decoders if d.serves(spec)) or "–"] * bool(decoders)
        sizes = f"multiples of {r.size_multiple} up to {r.max_size}"
        rows.append([f"`{spec.model_id}`", sizes, f"{r.frame_step}n+1 up to {r.max_frames}", *takes, *served])
    return table(head, rows)


def packages() -> str:
    """The distributions of the workspace, with what each registers."""
    rows = []
    for plugin in workspace_plugins():
        about = distribution(plugin.package).metadata["Summary"]
        provides = ", ".join(spec.model_id for spec in plugin.models)
        provides = provides and ", ".join(f"`{name}`" for name in provides.split(", "))
        rows.append([f"`{plugin.package}`", about, provides or "–"])
    return table(["package", "what", "models"], sorted(rows))


GENERATED: dict[str, Callable[[], str]] = {"models": models, "features": features, "weights": weights, "packages": packages}
"""By the comment that each takes the place of."""

MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.M)
OUTSIDE = re.compile(r"\[([^]]+)\]\((\.\./[^)\s]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    if len(MARKER.findall(markdown)) > 1:
        page.meta["hide"] = ["toc"]  # the tables need its place
    markdown = MARKER.sub(lambda found: GENERATED[found[1]](), markdown)
    return OUTSIDE.sub(lambda found: f"{found[1]} (`{found[2].lstrip('./')}` in the repository)", markdown)


def on_config(config: Any) -> Any:
    """mkdocs-click 0.9 doesn't know how click 8.5 says that an option has no default."""
    for option in _options(cli):
        if str(option.default) == "Sentinel.UNSET":
            option.default = None
    return config


def on_page_content(html: str, **_: object) -> str:
    """And marks it up by half."""
    return html.replace("<td>_required</td>", "<td>required</td>").replace("<td>None</td>", "<td></td>")


def _options(command: click.Command) -> Iterator[click.Parameter]:
    yield from command.params
    yield command.get_help_option(click.Context(command, help_option_names=["-h", "--help"]))  # click keeps what it makes
    for each in getattr(command, "commands", {}).values():
        yield from _options(each)
