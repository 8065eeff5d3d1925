"""Predictions for what others have measured on a v6e-8, in their settings: the table of docs/predictions.md.

    python benchmarks/published_predictions.py [NAME…] [--keep FOLDER]

Compiles each model's denoising step for the slice (minutes and gigabytes each; no TPU needed) and prices it with
`tpuvid.plan.cost`. `--keep` leaves the programs and the cycles of their schedules there, and takes those that it finds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from tpuvid.files.scratch import scratch_folder
from tpuvid.plan.bundles import dump_flags
from tpuvid.plan.cost import Prediction, predict
from tpuvid.plan.jobs import Jobs
from tpuvid.plan.schedules import schedule_cycles
from tpuvid.plan.topologies import parse_topology

TOPOLOGY = parse_topology("v6e-8")
BLOCKS = (3328, 2816, 256)
"""The blocks of stock splash in the published runs: queries, keys, keys per computation."""


@dataclasses.dataclass(frozen=True)
class Published:
    """A measurement, from model-contracts' table of published figures."""

    what: str
    seconds: float
    model: str | None = None
    """None: one self-attention call of Wan 2.1 14B at 720p on one chip's five heads."""
    replicated_rows: bool = False
    """Row-parallel layers replicated instead of all-reduced."""
    masked: bool = False
    """Keys that only pad a block, and padded text, masked by segment ids, as tpuvid does; else zeros that take part."""
    stock_attention: bool = False
    """CogVideoX's own attention processor, which joins the prompt's tokens and the video's before it projects them."""
    mesh: str = "dp=2,tp=4"
    """tp: Megatron's layout. sp: tokens split, all-to-all before and after self-attention."""


PUBLISHED = {
    "attention": Published("self-attention call of Wan 2.1 14B, 5 heads, 75,600 tokens", 43.93e-3),
    "wan": Published("Wan 2.1 14B, 1280×720×81, CFG", 4.60, "wan2.1-t2v-14b"),
    "wan-sequence": Published(
        "Wan 2.1 14B, as above, tokens instead of widths split", 4.60, "wan2.1-t2v-14b", mesh="dp=2,sp=4"
    ),
    "cogvideox": Published("CogVideoX1.5-5B, 1360×768×81, CFG", 2.31, "cogvideox1.5-5b", stock_attention=True),
    "hunyuan": Published("HunyuanVideo 1.5, 1280×720×121, CFG", 7.29, "hunyuanvideo-1.5-t2v-720p", replicated_rows=True),
    "hunyuan-masked": Published(
        "HunyuanVideo 1.5, as above, padding masked", 7.29, "hunyuanvideo-1.5-t2v-720p", replicated_rows=True, masked=True
    ),
    "hunyuan-8": Published(
        "HunyuanVideo 1.5, as above, one group of eight chips",
        7.29,
        "hunyuanvideo-1.5-t2v-720p",
        replicated_rows=True,
        mesh="dp=1,tp=8",
    ),
}


def compile_published(argument: Mapping[str, Any]) -> list[list[int]]:
    """A job: writes the scheduled program of `argument["name"]` to `argument["hlo"]`; returns its devices' coordinates."""
    import jax
    import jax.numpy as jnp
    from tpuvid.compute.kernels import splash
    from tpuvid.compute.kernels.block_sizes import Blocks

    published = PUBLISHED[argument["name"]]
    splash.BLOCKS = Blocks(*BLOCKS)

    def as_published(query, key, value, *, kv_mask=None, scale=None):
        """Keys padded with zeros to whole blocks, no mask: so no segment ids are compared."""
        key, value = (splash._pad(x, splash._blocks(query.shape[2], *x.shape[2:]).kv) for x in (key, value))
        return splash.attention_splash(query, key, value, scale=scale)

    attention = import_module("tpuvid.compute.kernels.attention")
    if not published.masked:
        attention.attention_splash = as_published
    devices = TOPOLOGY.jax_devices()
    if published.model is None:
        heads = jax.ShapeDtypeStruct((1, 5, 75_600, 128), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(devices[0]))
        compiled = jax.jit(as_published).lower(heads, heads, heads).compile()
    else:
        compiled = _denoising_step(published, devices)
    Path(argument["hlo"]).write_text(compiled.as_text())
    return [list(device.coords) for device in devices]


def _denoising_step(published: Published, devices: list) -> Any:
    from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
    from tpuvid.compute.runtime import DTYPES
    from tpuvid.contract.layout import MeshConfig
    from tpuvid.files.checkpoint import ConfigsOnly
    from tpuvid.plan.dryrun import DryRuntime, dry_generate
    from tpuvid.plugin.registry import registry

    spec = registry().get(published.model)
    sharding = import_module(f"{spec.load_denoiser.split('.')[0]}.sharding")
    if published.replicated_rows:
        sharding.TRANSFORMER = tuple(rule for rule in sharding.TRANSFORMER if rule[1] != (None, "tp"))
    if published.stock_attention:
        import_module(f"{spec.load_denoiser.split(':')[0]}").SplitTokenAttention = CogVideoXAttnProcessor2_0
    programs = []
    runtime = DryRuntime(
        DTYPES["bfloat16"],
        devices=devices,
        mesh_config=MeshConfig.parse(published.mesh),
        attention_backend="splash",
        compiled_stages=("denoise",),
        on_program=programs.append,
    )
    package, _, folder = spec.configs.partition(":")
    checkpoint = ConfigsOnly(spec.model_id, Path(str(files(package))) / folder, place=runtime.ledger.array)
    dry_generate(spec, checkpoint, spec.configure(prompt="a cat"), runtime)
    return max(programs, key=lambda program: program.calls).compiled


def prediction(name: str, folder: Path) -> Prediction:
    """Predict one published point; what was compiled for it lies in `folder` or comes there."""
    hlo, about = folder / f"{name}.hlo", folder / f"{name}.json"
    if not about.exists():
        with scratch_folder() as scratch, Jobs(scratch) as jobs:
            environment = TOPOLOGY.environment(dump_flags(scratch)) | {"PYTHONPATH": str(Path(__file__).parent)}
            jobs.start(name, "published_predictions:compile_published", {"name": name, "hlo": str(hlo)}, environment)
            *_, (_, done) = jobs.events()
            about.write_text(json.dumps({"coords": done["result"], "cycles": schedule_cycles(scratch)}))
    known = json.loads(about.read_text())
    return predict(hlo.read_text(), TOPOLOGY, coords=known["coords"], schedule_cycles=known["cycles"])


def row(name: str, found: Prediction) -> str:
    published = PUBLISHED[name]
    # of the attention call alone: the published figure is the kernel's
    seconds = found.parts["attention"].seconds if published.model is None else found.seconds
    parts = " | ".join(f"{part.seconds:.3f}" for part in found.parts.values())
    error = f"{seconds / published.seconds - 1:+.0%}"
    return (
        f"| {published.what} | {seconds:.4g} | {published.seconds:.4g} | {error} | {parts} | {found.collective_seconds:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"Of {', '.join(PUBLISHED)}; all by default.")
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(PUBLISHED):
        parser.error(f"{', '.join(unknown)}: choose from {', '.join(PUBLISHED)}")
    print("| point | predicted s | published s | error | attention | matmul | elementwise | collectives | other | links busy |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    with scratch_folder() as scratch:
        folder = arguments.keep or scratch
        folder.mkdir(parents=True, exist_ok=True)
        for name in arguments.names or PUBLISHED:
            print(row(name, prediction(name, folder)), flush=True)


if __name__ == "__main__":
    main()
