"""A plan as text."""

from __future__ import annotations

from typing import Any

from tpuvid.contract.wording import table
from tpuvid.plan.planner import GIB, Plan, StagePlan
from tpuvid.plan.topologies import LOCAL


def render(plan: Plan) -> str:
    config = plan.config
    guidance = "the checkpoint's own guidance" if config.guidance_scale is None else f"guidance {config.guidance_scale:g}"
    size = f"{config.width}x{config.height}, {config.num_frames} frames, {config.num_inference_steps} steps"
    how = "this machine's own backend" if plan.topology in LOCAL else "libtpu, on this machine"
    lines = [
        f"{plan.model_id} on {plan.topology} ({plan.devices} × {plan.device_kind}): {size}, {guidance}, {plan.dtype}",
        f"predicted: every program was compiled by {how}, and none was run",
        "",
        *_verdict(plan),
        f"layout: {plan.layout}",
        "",
        *table(
            ["stage", "layout", "weights GiB", "activations GiB", "peak GiB", "fits", "compile s", "s per video"],
            [_stage_row(stage) for stage in plan.stages.values()],
            numbers=True,
        ),
    ]
    for program in (p for stage in plan.stages.values() for p in stage.programs):
        lines += ["", *_program(program)]
    if plan.seconds is not None:
        lines += ["", f"one video: {_short(plan.seconds, 1)} s of computing, weights loaded and programs compiled"]
    return "\n".join(lines)


def _verdict(plan: Plan) -> list[str]:
    worst = max(plan.stages.values(), key=lambda stage: stage.peak)
    if worst.usable is None:
        return [f"memory: {worst.peak / GIB:.2f} GiB at most, in {worst.name}; this backend doesn't say how much there is"]
    used = f"{worst.peak / GIB:.2f} of {worst.usable / GIB:.2f} GiB per device, in {worst.name}"
    return [f"fits: {used}"] if plan.fits else [f"does not fit: {used}"]


def _stage_row(stage: StagePlan) -> list[str]:
    alone = all(size == 1 for size in stage.mesh.values())
    return [
        stage.name,
        "1 device" if alone else stage.layout or " ".join(f"{axis}={size}" for axis, size in stage.mesh.items() if size > 1),
        f"{stage.weights / GIB:.2f}",
        f"{(stage.peak - stage.weights) / GIB:.2f}",
        f"{stage.peak / GIB:.2f}",
        {True: "yes", False: "no", None: "?"}[stage.fits],
        f"{stage.compile_seconds:.0f}",
        "-" if stage.seconds is None else f"{stage.seconds:.2f}",
    ]


def _program(program: dict[str, Any]) -> list[str]:
    """Its time by part, its FLOPs and its collectives."""
    found = program["prediction"]
    title = f"{program['name']}, {program['calls']} times per video"
    if program["footprint"] is None:
        return [f"{title}: does not fit"]
    if found is None:
        return [f"{title}: no times for this backend"]
    flops = f"{_short(found['flops'] / 1e12, 1)} TFLOP per device"
    if found["seconds"] is None:
        lines = [f"{title}: {flops}; {found['reason']}"]
    else:
        lines = [
            f"{title}: {_short(found['seconds'])} s, {flops}, {found['share_of_peak']:.0%} of the peak",
            *table(
                ["  part", "s per run", "s per video", "share", "s bound by HBM", "s by XLA's estimate"],
                [
                    [
                        f"  {name}",
                        _short(part["seconds"]),
                        _short(part["seconds"] * program["calls"], 1),
                        f"{part['seconds'] / found['seconds']:.0%}",
                        _short(part["hbm_bound_seconds"]),
                        _short(part["estimated_seconds"]),
                    ]
                    for name, part in found["parts"].items()
                ],
                numbers=True,
            ),
        ]
    if found["collectives"]:
        kinds = sorted({c["kind"] for c in found["collectives"]})
        rows = [_collective_row(kind, [c for c in found["collectives"] if c["kind"] == kind]) for kind in kinds]
        lines += table(["  collective", "per run", "GB per device", "s", "s not hidden"], rows, numbers=True)
    return [*lines, *(f"  {note}" for note in found["notes"])]


def _collective_row(kind: str, found: list[dict[str, Any]]) -> list[str]:
    exposed = [c["exposed_seconds"] for c in found]
    return [
        f"  {kind}",
        str(sum(c["count"] for c in found)),
        _short(sum(c["count"] * c["bytes"] for c in found) / 1e9, 2),
        _short(sum(c["seconds"] for c in found)),
        "-" if None in exposed else _short(sum(exposed)),
    ]


def _short(number: float, digits: int = 3) -> str:
    """The number with so many decimals; where they would show less than two figures, with two."""
    return f"{number:.{digits}f}" if number == 0 or number >= 10 ** (1 - digits) else f"{number:.2g}"
