"""What is installed, which devices answer, which plugins load, and what is wrong."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

from tpuvid.files.versions import FORK, LIBRARIES, diffusers_kind, distribution_version
from tpuvid.plugin.registry import registry

TPU_DEVICE_FILES = ("/dev/accel0", "/dev/vfio/0")  # of older and of newer TPU machines

PACKAGES = ("tpuvid-core", *LIBRARIES, FORK, "safetensors", "pluggy", "av")


def examine() -> dict[str, Any]:
    """Versions, devices, plugins and problems, as JSON-ready data."""
    versions = {name: distribution_version(name) for name in PACKAGES}
    problems = [f"{name} is not installed" for name in ("jax", "torch", "torchax", "av") if not versions[name]]
    problems += registry().problems
    if not registry().models:
        problems.append("no model is registered; pip install tpuvid-wan")
    problems += [
        f"{name} is not installed, and the installed models need it"
        for name in ("diffusers", "transformers")
        if registry().models and not versions[name] and not (name == "diffusers" and versions[FORK])
    ]
    problems += _diffusers_problems(versions)
    devices, problem = _devices()
    problems += [problem] if problem else []
    problems += _torchax_problems()
    return {
        "python": f"{platform.python_version()} ({sys.platform})",
        "versions": {name: v for name, v in versions.items() if v},
        "diffusers": diffusers_kind(),
        "devices": devices,
        "environment": {
            k: v for k, v in sorted(os.environ.items()) if k.startswith("TPUVID_") or k in ("HF_HOME", "HF_HUB_OFFLINE")
        },
        "plugins": [
            {
                "name": p.name,
                "package": p.package,
                "version": p.version,
                "provides": p.provides,
                "error": p.error,
            }
            for p in registry().plugins
        ],
        "problems": problems,
    }


def _diffusers_problems(versions: dict[str, str | None]) -> list[str]:
    if versions["diffusers"] and versions[FORK]:
        return [f"diffusers and {FORK} are both installed and overwrite each other's files; uninstall both, then reinstall one"]
    return []


def _devices() -> tuple[list[str], str | None]:
    try:
        import jax

        devices = [f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices()]
    except Exception as error:  # whatever a backend raises while it starts is what the user needs to read
        return [], f"JAX finds no device: {str(error).splitlines()[0]}"
    if jax.default_backend() == "cpu" and any(map(os.path.exists, TPU_DEVICE_FILES)):
        return devices, "this machine has a TPU that JAX doesn't use; pip install 'tpuvid-core[tpu]'"
    return devices, None


def _torchax_problems() -> list[str]:
    try:
        from tpuvid.compute.bridge import environment

        environment()
    except Exception as error:
        return [f"torchax can't be used: {type(error).__name__}: {error}"]
    return []


def render(report: dict[str, Any]) -> str:
    """`examine`'s result for people."""
    lines = [f"Python     {report['python']}"]
    lines += [f"{name:<15} {v}" for name, v in report["versions"].items()]
    lines.append(f"diffusers in use: {report['diffusers']}")
    lines.append(f"devices: {', '.join(report['devices']) or 'none'}")
    lines += [f"{name}={value}" for name, value in report["environment"].items()]
    lines.append("plugins:")
    for plugin in report["plugins"]:
        state = plugin["error"] or ", ".join(plugin["provides"]) or "nothing"
        lines.append(f"  {'✗' if plugin['error'] else '✓'} {plugin['name']} ({plugin['package']} {plugin['version']}): {state}")
    lines += [f"problem: {p}" for p in report["problems"]] or ["no problems found"]
    return "\n".join(lines)
