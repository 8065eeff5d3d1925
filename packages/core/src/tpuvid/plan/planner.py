"""`tpuvid plan`: does a model at a size fit a slice, how is it laid out, how long will it take; what to change if it doesn't.

Imports neither jax nor torch: the compiling is done by jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tpuvid.contract.events import Progressed
from tpuvid.contract.layout import MeshConfig
from tpuvid.contract.models import ModelSpec
from tpuvid.contract.options import Options
from tpuvid.contract.settings import SETTINGS, GenerationConfig
from tpuvid.contract.stages import STAGES
from tpuvid.errors import InputError
from tpuvid.files.scratch import scratch_folder
from tpuvid.plan.bundles import dump_flags
from tpuvid.plan.jobs import Jobs, Task, jobs_at_once
from tpuvid.plan.topologies import LOCAL, parse_topology, require_libtpu, slices_of

GIB = 2**30
JOB_BYTES = 6 * GIB
"""Memory that a job is granted: the VAEs' take the most, 4.5 GiB was seen for HunyuanVideo's at 720p."""
GROUPS = (("denoise",), ("encode", "decode"))
"""Stages that one job compiles; the groups take about as long as each other."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class StagePlan:
    """One stage on a slice; bytes are per device."""

    name: str
    weights: int
    layout: str | None
    """The layout as `--mesh` takes it; None for a stage that lies as a plugin has laid it."""
    programs: list[dict[str, Any]]
    usable: int | None
    """The bytes that programs may use on each device; None where the backend doesn't tell."""

    @property
    def peak(self) -> int:
        return max((program["peak"] for program in self.programs), default=self.weights)

    @property
    def fits(self) -> bool | None:
        """Whether it fits; None where the backend doesn't say how much memory there is."""
        return None if self.usable is None else self.peak <= self.usable

    @property
    def compile_seconds(self) -> float:
        return sum(program["compile_seconds"] for program in self.programs)

    @property
    def busiest(self) -> dict[str, Any]:
        """The program that runs most often: of "denoise", a step."""
        return max(self.programs, key=lambda program: program["calls"])

    @property
    def mesh(self) -> dict[str, int]:
        return self.programs[0]["mesh"]

    @property
    def seconds(self) -> float | None:
        """The predicted seconds of all calls for one video; None where any is not predicted."""
        seconds = [p["prediction"] and p["prediction"]["seconds"] for p in self.programs]
        return None if None in seconds else sum(s * p["calls"] for s, p in zip(seconds, self.programs, strict=True))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "peak": self.peak,
            "fits": self.fits,
            "compile_seconds": round(self.compile_seconds, 1),
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Plan:
    model_id: str
    topology: str
    device_kind: str
    devices: int
    dtype: str
    config: GenerationConfig
    mesh_asked: str | None
    stages: dict[str, StagePlan]
    versions: dict[str, str]
    """The versions of what compiled it."""

    @property
    def fits(self) -> bool | None:
        fits = [stage.fits for stage in self.stages.values()]
        return None if None in fits else all(fits)

    @property
    def seconds(self) -> float | None:
        """The predicted seconds of one video; None where those of any stage are not predicted."""
        known = [seconds for stage in self.stages.values() if (seconds := stage.seconds) is not None]
        return sum(known) if len(known) == len(self.stages) else None

    @property
    def layout(self) -> str:
        """The denoiser's layout, and why."""
        text = self.stages["denoise"].layout
        if self.devices == 1 or text is None:
            return "one device" if self.devices == 1 else "the plugin's own"
        layout = MeshConfig.parse(text)
        if self.mesh_asked:
            return f"{layout}, as asked"
        why = ["dp for the two halves of guidance"] if layout.dp > 1 else []
        if layout.sp > 1:
            why.append("sp splits the tokens among the rest")
            why.append(
                "fsdp: copies of the weights would leave too little memory" if layout.fsdp else "weights replicated: they fit"
            )
        else:
            why.append("tp the largest split of the rest that divides the heads and widths of this model")
        if layout.size < self.devices:
            why.append(f"{self.devices - layout.size} devices idle")
        return f"{layout}: {', '.join(why)}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "predicted": True,
            "model_id": self.model_id,
            "topology": self.topology,
            "device_kind": self.device_kind,
            "devices": self.devices,
            "dtype": self.dtype,
            "versions": self.versions,
            "settings": self.config.to_dict(),
            "fits": self.fits,
            "layout": self.layout,
            "seconds": self.seconds,
            "compile_seconds": round(sum(stage.compile_seconds for stage in self.stages.values()), 1),
            "stages": {name: stage.to_dict() for name, stage in self.stages.items()},
        }


class Planner:
    """Compiles stages of one model, for one slice after the other."""

    def __init__(self, model: str, spec: ModelSpec, options: Options, say: Say):
        """`say` is told what goes on."""
        self.model, self.spec, self.options, self.say = model, spec, options, say

    def plan(self, topology: str, config: GenerationConfig) -> Plan:
        """Compile every stage for `topology` ("v6e-8", "cpu", …).

        Raises `InputError` for a topology or options that can't be had.
        """
        groups = (tuple(STAGES),) if topology == "gpu" else GROUPS  # one process at a time can have the GPU
        found = self._compile([(topology, stages, config, self.options) for stages in groups], predict=True)
        first = found[0]
        compiled = {name: stage for result in found for name, stage in _stages(result).items()}
        return Plan(
            model_id=self.spec.model_id,
            topology=topology if topology in LOCAL else parse_topology(topology).name,
            device_kind=first["device_kind"],
            devices=first["devices"],
            dtype=first["dtype"],
            config=config,
            mesh_asked=None if self.options.mesh is None else str(self.options.mesh),
            stages={name: compiled[name] for name in STAGES},
            versions=first["versions"],
        )

    def plan_stages(self, topology: str, config: GenerationConfig, stages: Sequence[str]) -> dict[str, StagePlan]:
        """Compile some stages alone, with their times; otherwise as `plan`."""
        (found,) = self._compile([(topology, stages, config, self.options)], predict=True)
        return _stages(found)

    def largest_num_frames(
        self, topology: str, config: GenerationConfig, stages: Sequence[str] = ("denoise", "decode")
    ) -> int | None:
        """The most frames with which `stages` fit on a TPU slice, all else as in `config`; None where one frame is too much.

        Memory grows linearly with frames, nearly: a straight line through two sizes says where to look (at first through the
        weights, which are there without frames), compiling there says whether it is so. What is returned has been
        compiled; that the next size would be too much may be said by the line alone.
        """
        rules = self.spec.rules
        step, most = rules.frame_step, (rules.max_frames - 1) // rules.frame_step

        def compile_with(n: int) -> StagePlan:
            """The stage that, with step·n + 1 frames, comes closest to what is usable, or is most beyond it."""
            (found,) = self._compile([(topology, stages, config.override(num_frames=step * n + 1), self.options)])
            return max(_stages(found).values(), key=lambda stage: stage.peak)

        low, high = -1, most + 1  # n = low fits, n = high doesn't
        known: dict[int, int] = {}
        """Bytes beyond what is usable, by n."""
        guess = (config.num_frames - 1) // step
        while low + 1 < high:
            stage = compile_with(guess)
            assert stage.usable is not None, "a TPU's memory is known"
            known[guess] = stage.peak - stage.usable
            low, high = (guess, high) if stage.fits else (low, guess)
            if len(known) == 1:
                guess = int(guess * max(stage.usable - stage.weights, 0) / max(stage.peak - stage.weights, 1))
            else:
                (n0, y0), (n1, y1) = sorted(known.items(), key=lambda item: abs(item[1]))[:2]
                slope = (y1 - y0) / (n1 - n0)
                if low in known and known[low] + slope > 0:
                    break
                guess = int(n0 - y0 / slope) if slope > 0 else (low + high) // 2
                guess = guess if guess not in known else guess + (1 if known[guess] <= 0 else -1)
            guess = min(max(guess, low + 1), high - 1)
        return None if low < 0 else step * low + 1

    def remedies(self, plan: Plan) -> Iterator[str]:
        """Changes that make a plan for a TPU slice fit, as flags: other layouts, more chips, fewer frames; the nearest of each.

        Each was compiled, but for what concerns the text encoder alone.
        """
        failing = {name for name, stage in plan.stages.items() if stage.fits is False}
        if not failing:
            return
        topology, config = parse_topology(plan.topology), plan.config
        self.say(f"{', '.join(failing)} doesn't fit; looking for what does")
        always = ["--text-encoder-device cpu (of generate)"] if "encode" in failing else []
        if failing == {"encode"}:
            yield always[0]
            return
        must_fit = sorted(failing - {"encode"})
        decodes, tiles = "decode" not in failing, []
        if not decodes and not self.options.vae_tiling:
            decodes = self._fits(plan.topology, ("decode",), config, replace(self.options, vae_tiling=True))
            tiles = ["--vae-tiling"] if decodes else []
        if decodes and "denoise" not in failing:
            yield " ".join([*always, *tiles])
        if decodes and "denoise" in failing:
            for mesh in _other_meshes(plan):
                if self._fits(plan.topology, ("denoise",), config, replace(self.options, mesh=mesh)):
                    yield " ".join([f"--mesh {mesh}", *always, *tiles])
                    break
        for larger in slices_of(topology.chip, more_than=topology.chips):
            if self._fits(larger.name, must_fit, config, replace(self.options, mesh=None)):
                yield " ".join([f"--topology {larger.name}", *always])
                break
        frames = self.largest_num_frames(plan.topology, config, must_fit)
        if frames is not None:
            yield " ".join([f"--num-frames {frames}", *always])
        else:
            yield "a smaller --height and --width: one frame is too much at this size"

    def _fits(self, topology: str, stages: Sequence[str], config: GenerationConfig, options: Options) -> bool:
        try:
            (found,) = self._compile([(topology, stages, config, options)])
        except InputError:  # a layout that doesn't divide this model
            return False
        return all(stage.fits for stage in _stages(found).values())

    def _compile(
        self, wanted: Sequence[tuple[str, Sequence[str], GenerationConfig, Options]], *, predict: bool = False
    ) -> list[dict[str, Any]]:
        """One job for each (topology, stages, config, options); as many at a time as cores and memory allow.

        With `predict`, they also say how long programs take; else only what memory they need.
        """
        results: dict[str, dict[str, Any]] = {}
        with scratch_folder() as scratch, Jobs(scratch) as jobs:
            tasks = (self._task(str(n), *what, scratch if predict else None) for n, what in enumerate(wanted))
            for name, event in jobs.run(tasks, min(len(wanted), jobs_at_once(JOB_BYTES))):
                at = Progressed(**event["progressed"]) if "progressed" in event else None
                if at and at.what.startswith("compile") and at.seconds is None:
                    topology, _, config, _ = wanted[int(name)]
                    self.say(f"{topology}, {config.num_frames} frames: {at.what}")
                if "result" in event:
                    results[name] = event["result"]
        return [results[str(n)] for n in range(len(wanted))]

    def _task(
        self, name: str, topology: str, stages: Sequence[str], config: GenerationConfig, options: Options,
        scratch: Path | None,
    ) -> Task:  # fmt: skip
        """`scratch`: where libtpu may leave schedules, from which times are predicted."""
        dump = None
        if scratch and topology not in LOCAL:
            dump = scratch / f"dump-{name}"
            dump.mkdir()
        argument = {
            "model": self.model,
            "topology": topology,
            "stages": list(stages),
            "settings": _settings(config),
            "options": options.recorded(),
            "dump": dump and str(dump),
        }
        return Task(name, "tpuvid.plan.programs:compile_stages", argument, _environment(topology, dump))


def _settings(config: GenerationConfig) -> dict[str, Any]:
    """What decides the programs' shapes, and how often they run."""
    asked = {name: getattr(config, name) for name, each in SETTINGS.items() if each.programs or each.calls}
    return {name: value for name, value in asked.items() if value is not None}


def _environment(topology: str, dump: Path | None) -> dict[str, str]:
    """The environment variables of a job; libtpu leaves its schedules in `dump`."""
    match topology:
        case "cpu":
            return {"JAX_PLATFORMS": "cpu"}
        case "gpu":
            return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    require_libtpu()
    return parse_topology(topology).environment(dump_flags(dump) if dump else "")


def _stages(result: Mapping[str, Any]) -> dict[str, StagePlan]:
    return {name: StagePlan(name, usable=result["usable"], **stage) for name, stage in result["stages"].items()}


def _other_meshes(plan: Plan) -> list[str]:
    """Layouts over all devices but the one that was tried, those that split the most first."""
    pairs = [(dp, plan.devices // dp) for dp in (1, 2) if plan.devices % dp == 0]
    layouts = [MeshConfig(dp=dp, sp=rest, fsdp=True) for dp, rest in pairs if rest > 1]
    layouts += [MeshConfig(dp=dp, tp=rest) for dp, rest in pairs]
    return [str(layout) for layout in layouts if str(layout) != plan.stages["denoise"].layout and layout.size > 1]
