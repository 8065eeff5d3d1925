"""Dry runs against real ones, and plans made of what jobs report."""

import gc
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpuvid
from tpuvid import InputError
from tpuvid.cli.main import run
from tpuvid.compute.mesh import make_mesh
from tpuvid.compute.runtime import Programs
from tpuvid.contract import MeshConfig
from tpuvid.contract.layout import AXES
from tpuvid.contract.options import Options
from tpuvid.family import replicated
from tpuvid.files.scratch import scratch_folder
from tpuvid.plan.dryrun import AbsentArray, DryRuntime, Ledger, _needed_hbm, configs_checkpoint, dry_generate
from tpuvid.plan.jobs import Jobs
from tpuvid.plan.planner import GIB, Planner
from tpuvid.plan.report import _short, render
from tpuvid.plugin.lookup import resolve_model
from tpuvid.plugin.registry import registry

OPTIONS = Options(dtype="float32")
SMALL = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 12, "cache": "deepcache", "cache_start_step": 2}


@pytest.fixture
def dry():
    """A dry runtime, and the programs that it was told of."""
    programs, ledger = [], Ledger()
    return DryRuntime.create(dtype="float32", ledger=ledger, on_program=programs.append), programs


def wan_tiny(ledger):
    spec, checkpoint = resolve_model("wan-tiny")
    return spec, configs_checkpoint(spec, checkpoint, ledger.array)


def dry_run(job):
    """In a process of its own: under pytest annotations are checked, and an absent array is none."""
    found = {}
    for stages in job["stages"]:
        programs, ledger = [], Ledger()
        runtime = DryRuntime.create(dtype="float32", ledger=ledger, on_program=programs.append, compiled_stages=tuple(stages))
        spec, checkpoint = wan_tiny(ledger)
        loaded = dry_generate(spec, checkpoint, spec.configure(prompt="a red circle", **SMALL), runtime)
        calls = [(p.stage, p.name, p.calls) for p in programs]
        found["+".join(stages)] = {
            "weights": {n: stage.weights for n, stage in loaded.items()},
            "programs": calls,
            "left": ledger.bytes(),
        }
    return found


def test_a_dry_run_compiles_and_calls_what_generate_does():
    with scratch_folder() as scratch, Jobs(scratch) as jobs:
        wanted = {"stages": [["encode", "denoise", "decode"], ["denoise"]]}
        jobs.start("dry", "together.test_plan:dry_run", wanted, {"PYTHONPATH": str(Path(__file__).parents[1])})
        calls, compile_ = [], Programs._compile

        def counted(self, what, function, args):
            compiled = compile_(self, what, function, args)

            def call(*args):
                calls.append(what)
                return compiled(*args)

            call.out_info = compiled.out_info
            return call

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Programs, "_compile", counted)
            pipe = tpuvid.load("wan-tiny", dtype="float32")
            pipe.generate("a red circle", **SMALL)
        found = [event for _, event in jobs.events()][-1]["result"]

    whole, denoise = found["encode+denoise+decode"], found["denoise"]
    assert {name: n for _, name, n in whole["programs"]} == Counter(calls)
    assert "cached step (deepcache)" in calls
    assert whole["weights"] == {name: sum(a.nbytes for a in stage.params.values()) for name, stage in pipe._opened.items()}
    assert whole["left"] == 0, "each stage was freed"
    assert {stage for stage, _, _ in denoise["programs"]} == {"denoise"}
    assert list(denoise["weights"]) == ["encode", "denoise"], "what comes after the last one doesn't run"


def test_a_dry_run_reads_no_weights(tmp_path, dry):
    runtime, programs = dry
    spec, checkpoint = resolve_model("wan-tiny")
    bare = shutil.copytree(checkpoint.folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    spec, checkpoint = resolve_model(str(bare))
    found = configs_checkpoint(spec, checkpoint, runtime.ledger.array)
    dry_generate(spec, found, spec.configure(prompt="a red circle", **SMALL), replace(runtime, compiled_stages=("encode",)))
    assert [p.name for p in programs] == ["text encoder"]
    with pytest.raises(InputError, match="holds no .safetensors"):
        checkpoint.require(("vae",))


@pytest.mark.parametrize("model", ["wan2.1-t2v-14b", "cogvideox1.5-5b", "hunyuanvideo-1.5-t2v-480p"])
def test_registered_models_are_planned_from_their_packages_configs(model):
    spec, checkpoint = resolve_model(model)
    found = configs_checkpoint(spec, checkpoint, lambda *_: None)
    assert found.folder.name == model and found.repo_id is None


def test_arrays_alive_at_a_call_count_and_freed_ones_do_not(dry):
    runtime, programs = dry
    mesh = make_mesh(MeshConfig(), runtime.devices)
    get = replace(runtime, stage="decode").programs(mesh).get

    def put(*shape):
        return runtime.put(np.zeros(shape, np.float32), replicated(mesh))

    x, other = put(256, 1024), put(512, 1024)
    double = get("double", lambda x: 2 * x, x)
    y = double(x)
    assert (y.shape, y.dtype, y.nbytes) == ((256, 1024), np.float32, 2**20)
    assert programs[0].around == 2 * 2**20, "what isn't an argument"
    del other
    gc.collect()
    assert runtime.ledger.bytes() == 2 * 2**20
    double(x)
    assert programs[0].calls == 2 and programs[0].around == 2 * 2**20, "the most, of all calls"
    assert programs[0].footprint.total >= 2 * 2**20
    assert y[:64].nbytes == 2**18 and y[0].shape == (1024,)


def test_a_program_over_a_mesh_counts_one_devices_share():
    struct = jax.ShapeDtypeStruct((8, 64), jnp.bfloat16)
    sharding = jax.sharding.NamedSharding(jax.sharding.AbstractMesh((4,), ("tp",)), jax.sharding.PartitionSpec(None, "tp"))
    array = AbsentArray(struct.shape, struct.dtype, sharding, Ledger())
    assert array.nbytes == 8 * 64 * 2 // 4


@pytest.mark.parametrize(
    "message, gib",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (35.08G) "
            "exceeds available HBM (31.25G).",
            35.08,
        ),
        ("Ran out of memory in memory space hbm. Used 512.00M of 31.25G hbm.", 0.5),
    ],
)  # fmt: skip
def test_what_the_compiler_would_have_needed(message, gib):
    assert _needed_hbm(message) == pytest.approx(gib * GIB, rel=1e-6)
    assert _needed_hbm("INTERNAL: Mosaic failed") is None


class LinearPlanner(Planner):
    """Memory as a straight line in latent frames; counts the compiles."""

    def __init__(self, base: float, slope: float, usable: float = 31.25):
        super().__init__("wan2.1-t2v-14b", registry().get("wan2.1-t2v-14b"), OPTIONS, say=lambda line: None)
        self.base, self.slope, self.usable, self.compiled = base, slope, usable, []

    def _compile(self, wanted, *, predict=False):
        results = []
        for topology, stages, config, options in wanted:
            chips = 4 if "4" in topology else 8 if "8" in topology else 1
            self.compiled.append((topology, tuple(stages), config.num_frames, options.mesh, options.vae_tiling))
            latents = (config.num_frames - 1) // 4 + 1
            used = {
                "encode": 2.0,
                "denoise": (self.base + self.slope * latents) / chips,
                "decode": 12.0 if options.vae_tiling else 17.0 / chips,  # tiles have one device
            }
            mesh = MeshConfig.parse(options.mesh or "dp=1")
            results.append(
                {
                    "usable": int(self.usable * GIB), "device_kind": "TPU v6 lite", "versions": {}, "devices": chips,
                    "dtype": "bfloat16",
                    "stages": {
                        stage: {"weights": GIB, "layout": str(mesh), "programs": [{
                            "name": stage, "calls": 50, "mesh": {axis: getattr(mesh, axis) for axis in AXES},
                            "compile_seconds": 1.0, "footprint": None, "around": 0, "peak": int(used[stage] * GIB),
                            "prediction": None,
                        }]}
                        for stage in stages
                    },
                }
            )  # fmt: skip
        return results


@pytest.mark.parametrize("base, slope", [(10, 1), (28, 0.05), (1, 0.01), (31.2, 0.04)])
def test_the_largest_number_of_frames_is_found_in_few_compiles(base, slope):
    planner = LinearPlanner(base, slope)
    config = planner.spec.configure()
    found = planner.largest_num_frames("v6e-1", config, ("denoise",))
    most = min(int((31.25 - base) / slope + 1e-9), 1024)  # latent frames
    assert found == (4 * (most - 1) + 1 if most >= 1 else None)
    assert len(planner.compiled) <= 8


def test_no_frame_fits_where_weights_alone_do_not():
    planner = LinearPlanner(40, 1)
    assert planner.largest_num_frames("v6e-1", planner.spec.configure(), ("denoise",)) is None


def test_a_plan_that_does_not_fit_says_what_does():
    planner = LinearPlanner(20, 1, usable=16)
    plan = planner.plan("v6e-1", planner.spec.configure())
    assert (
        plan.fits is False and not plan.stages["denoise"].fits and not plan.stages["decode"].fits and plan.stages["encode"].fits
    )
    assert list(planner.remedies(plan)) == [
        "--topology v6e-4",
        "a smaller --height and --width: one frame is too much at this size",
    ]
    assert "does not fit: 41.00 of 16.00 GiB per device, in denoise" in render(plan)
    assert json.loads(json.dumps(plan.to_dict()))["fits"] is False


def test_where_only_the_vae_is_too_large_tiles_are_enough_or_more_chips():
    planner = LinearPlanner(2, 0.1, usable=16)
    plan = planner.plan("v6e-1", planner.spec.configure())
    assert list(planner.remedies(plan))[:2] == ["--vae-tiling", "--topology v6e-4"]


def test_what_fits_needs_no_remedy():
    planner = LinearPlanner(2, 0.1)
    plan = planner.plan("v6e-1", planner.spec.configure())
    assert plan.fits and list(planner.remedies(plan)) == [] and len(planner.compiled) == 2


def test_plan_answers_for_this_machine(capsys):
    assert run(["plan", "--model", "wan-tiny", "--topology", "cpu", "--num-frames", "5", "--steps", "3", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["predicted"] is True and plan["topology"] == "cpu" and plan["dtype"] == "float32"
    assert [p["calls"] for p in plan["stages"]["denoise"]["programs"]] == [1, 3], "the prompt's keys and values, and the steps"
    assert plan["fits"] is None and plan["stages"]["denoise"]["seconds"] is None, "a CPU says neither"
    assert plan["stages"]["denoise"]["peak"] > plan["stages"]["denoise"]["weights"] > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--topology", "v6e-3"], "v6e comes as v6e-1"),
        (["--topology", "cpu", "--num-frames", "18"], "4n.1 frames"),
        (["--topology", "cpu", "--mesh", "dp=3,tp=9"], "needs 27 devices"),
        (["--topology", "gpu"], "JAX sees no gpu"),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments, message, capsys):
    assert run(["plan", "--model", "wan-tiny", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("tpuvid: error:") and re.search(message, error)


@pytest.mark.parametrize(
    "number, text", [(3.2391, "3.239"), (0.013, "0.013"), (0.00042, "0.00042"), (2.1e-7, "2.1e-07"), (0.0, "0.000")]
)
def test_small_numbers_keep_two_figures(number, text):
    assert _short(number) == text
