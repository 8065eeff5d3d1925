"""Which models are checked, and the process that checks them: on a CPU, with eight devices of which XLA only pretends."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from tpuvid.contract.models import ModelSpec
from tpuvid.errors import InputError, TpuvidError
from tpuvid.files.scratch import scratch_folder
from tpuvid.plan.jobs import Jobs
from tpuvid.plugin.loader import Plugin
from tpuvid.plugin.registry import CORE, registry
from tpuvid.testing.sheet import Result, Sheet

DEVICES = 8
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "true",
    "HF_HUB_OFFLINE": "1",
}


def check(
    what: str | None = None,
    *,
    checkpoint: Path | None = None,
    on_title: Callable[[str], None] = lambda title: None,
    on_result: Callable[[Result], None] = lambda result: None,
) -> list[Sheet]:
    """The score sheets of `what`: a distribution, a plugin's name or a model's id; None: of all plugins that are installed.

    `checkpoint`: a small diffusers folder to run, in the place of the one that the model's `Conformance` makes. The functions
    are told of each sheet and each result as it comes. Raises `InputError` where nothing of that name is installed.
    """
    plugins = _named(what)
    if checkpoint is not None and not checkpoint.is_dir():
        raise InputError(f"{checkpoint}: is no folder; give a small diffusers checkpoint")
    sheets = []
    for title, run in _subjects(plugins, what, checkpoint):
        on_title(title)
        results = []
        for result in run():
            on_result(result)
            results.append(result)
        sheets.append(Sheet(title, results))
    return sheets


def _named(what: str | None) -> Sequence[Plugin]:
    plugins = registry().plugins
    if what is None:
        ours = [p for p in plugins if p.name != CORE]
        if not ours:
            raise InputError(
                "no models are installed; pip install -e . in the folder of your plugin, or pip install tpuvid-wan"
            )
        return ours
    name = what.replace("_", "-").lower()
    found = [p for p in plugins if name in (p.name, p.package.replace("_", "-").lower())]
    found = found or [p for p in plugins if any(spec.model_id == what for spec in p.models)]
    if not found:
        known = ", ".join(
            f"{p.package} ({', '.join(s.model_id for s in p.models) or p.name})" for p in plugins if p.name != CORE
        )
        raise InputError(f"plugin {what!r} is not installed; installed: {known or 'none'}")
    return found


Run = Callable[[], Iterator[Result]]


def _subjects(plugins: Sequence[Plugin], what: str | None, checkpoint: Path | None) -> Iterator[tuple[str, Run]]:
    """Models of one plugin that the same code runs are one subject."""
    for plugin in plugins:
        package = f"{plugin.package} {plugin.version}"
        if plugin.error or not plugin.models:
            loads = Result("loads", not plugin.error, plugin.error or f"{', '.join(plugin.provides)}; no models to check")
            yield f"{plugin.name} ({package})", partial(iter, [loads])
        for conflict in registry().conflicts:
            if plugin.package in conflict.packages:
                yield f"{plugin.name} ({package})", partial(iter, [Result("loads", False, str(conflict))])
        groups: dict[tuple[str | None, ...], list[ModelSpec]] = {}
        for spec in plugin.models:
            if what not in {s.model_id for s in plugin.models} or spec.model_id == what:
                groups.setdefault(_run_by(spec), []).append(spec)
        for specs in groups.values():
            ids = [spec.model_id for spec in specs]
            yield f"{', '.join(ids)} ({package})", partial(_in_a_process, ids, checkpoint)


def _run_by(spec: ModelSpec) -> tuple[str | None, ...]:
    own = spec.checkpoint if spec.conformance is None else spec.conformance.random_checkpoint
    return spec.load_text_encoder, spec.load_denoiser, spec.load_decoder, own


def _in_a_process(model_ids: Sequence[str], checkpoint: Path | None) -> Iterator[Result]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}".strip()
    with scratch_folder() as scratch, Jobs(scratch) as jobs:
        argument = {"models": list(model_ids), "checkpoint": checkpoint and str(checkpoint.resolve()), "folder": str(scratch)}
        jobs.start("check", "tpuvid.testing.suite:run", argument, ENVIRONMENT | {"XLA_FLAGS": flags})
        begun = "begin"
        try:
            for _, event in jobs.events():
                begun = event.get("begins", begun)
                if "check" in event:
                    yield Result(**event)
        except TpuvidError as error:  # the process is gone, whatever the plugin's code did to it
            yield Result(begun, False, str(error))
