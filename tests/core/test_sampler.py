"""The loop around a model: order, reports, guidance, step caches, warm-up and profiles, on a small torch module."""

import gzip
import json
from pathlib import Path

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from tpuvid.compute.mesh import make_mesh
from tpuvid.compute.progress import Progress
from tpuvid.compute.step_caches import DeepCache, Uncached
from tpuvid.compute.step_profiler import PROFILED_STEPS, new_folder, steady_steps
from tpuvid.contract import Loop, MeshConfig
from tpuvid.errors import TpuvidError
from tpuvid.family import (
    Runtime,
    Sampler,
    Scan,
    Schedule,
    TracedModule,
    build,
    make_generators,
    make_noise,
    tabulate,
)

SHAPE = (1, 2, 3, 4)
STEPS = 8
CACHE = DeepCache(start_step=2, end_step=7, step_interval=3)  # full: 0, 1, 2, 5, 7
UNCACHED = Uncached()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states, temb):
        return hidden_states + torch.tanh(self.linear(hidden_states) + temb)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x, timestep, text):
        temb = (timestep / 1000)[:, None, None, None]
        x = self.embed(x) + text
        for block in self.blocks:
            x = block(x, temb)
        return self.out(x) * (1 + temb)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def schedule():
    return tabulate(diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), STEPS)


def run(net, schedule, *, cache=UNCACHED, scale=3.0, on_step=lambda done, total: None, **options):
    runtime = Runtime.create(dtype="float32", **options)
    events = []
    traced = TracedModule(build(Net), scan={"blocks": Scan(1)})
    params = {k: v.numpy() for k, v in net.state_dict().items() if "blocks" not in k}
    for leaf in ("weight", "bias"):
        params[f"blocks.*.linear.{leaf}"] = np.stack([getattr(block.linear, leaf).detach().numpy() for block in net.blocks])
    params = {k: jnp.asarray(v) for k, v in params.items()}

    def predict(params, latents, timesteps, text):
        return traced.function("forward")(params, latents, timesteps, text)

    sampler = Sampler(traced, predict, make_mesh(MeshConfig(), runtime.devices), runtime)
    generators = make_generators([0])
    noise = make_noise(SHAPE[1:], generators)
    scales = None if scale is None else np.full(STEPS, scale, np.float32)
    text = jnp.asarray([0.5] if scale is None else [0.5, -0.25]).reshape(-1, 1, 1, 1)
    loop = Loop(seeds=(0,), after_step=lambda at: on_step(at.done, at.total))
    with Progress(events.append).watching() as progress:
        found = sampler.sample(params, text, noise, schedule, scales=scales, generators=generators, cache=cache, loop=loop)
    progress.begun = list(dict.fromkeys(event.what for event in events))
    return found, progress, generators[0]


@torch.no_grad()
def expected(net, schedule: Schedule, scale, full_steps):
    """The same loop in torch; a step that is not full takes what entered the last block at the last full one."""
    noise = make_noise(SHAPE[1:], make_generators([0]))
    state = np.concatenate([noise[None], np.zeros((schedule.memories, *noise.shape), np.float32)])
    kept = {}
    for step, (timestep, weights) in enumerate(zip(schedule.timesteps, schedule.weights, strict=True)):
        outputs = []
        for text in (0.5, -0.25):
            temb = torch.tensor(timestep) / 1000
            if full_steps[step]:
                x = net.embed(torch.tensor(state[0])) + text
                for block in net.blocks[:-1]:
                    x = block(x, temb)
                kept[text] = x
            outputs.append((net.out(net.blocks[-1](kept[text], temb)) * (1 + temb)).numpy())
        output = outputs[0] if scale is None else outputs[1] + scale * (outputs[0] - outputs[1])
        state = np.tensordot(weights, np.concatenate([state, output[None]]), axes=1)
    return state[0]


@pytest.mark.parametrize("cache", [UNCACHED, CACHE], ids=["uncached", "deepcache"])
@pytest.mark.parametrize("scale", [3.0, None])
def test_the_loop_is_the_algorithm(net, schedule, cache, scale):
    found, _, _ = run(net, schedule, cache=cache, scale=scale)
    np.testing.assert_allclose(found, expected(net, schedule, scale, cache.full_steps(STEPS)), rtol=0, atol=1e-4)


def test_a_cached_run_differs_and_says_which_steps(net, schedule):
    plain, progress, _ = run(net, schedule)
    assert "cache" not in progress.notes
    found, progress, _ = run(net, schedule, cache=CACHE)
    assert np.abs(found - plain).max() > 1e-3
    assert progress.notes["cache"] == {"name": "deepcache", "full": "0-2, 5, 7", "cached": "3-4, 6", "saved_steps": 3}


def test_both_programs_compile_before_the_first_step(net, schedule):
    _, progress, _ = run(net, schedule, cache=CACHE, warmup_steps=1)
    assert progress.begun == ["compile full step (deepcache)", "compile cached step (deepcache)", "warm up", "denoise"]


@pytest.mark.parametrize("cache", [UNCACHED, CACHE], ids=["uncached", "deepcache"])
@pytest.mark.parametrize("draws", [(), (1,) * STEPS], ids=["deterministic", "stochastic"])
def test_warm_up_changes_nothing(net, schedule, cache, draws):
    """Bit for bit: the scheduler's memories, the cache and the generator are untouched."""
    schedule = Schedule(schedule.timesteps, schedule.weights, draws)
    (a, _, one), (b, _, two) = (run(net, schedule, cache=cache, warmup_steps=n) for n in (0, 3))
    assert np.array_equal(a, b) and torch.equal(one.get_state(), two.get_state())


def test_draws_enter_the_first_memories(net, schedule):
    stochastic, _, generator = run(net, Schedule(schedule.timesteps, schedule.weights, (0, 1) + (0,) * (STEPS - 2)))
    plain, _, _ = run(net, schedule)
    assert not np.array_equal(stochastic, plain)
    (stock,) = make_generators([0])
    for _ in range(2):  # the noise, and one draw
        make_noise(SHAPE[1:], [stock])
    assert torch.equal(generator.get_state(), stock.get_state())


def test_steps_report_and_a_callbacks_exception_stops_the_run(net, schedule):
    seen = []
    run(net, schedule, on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, STEPS) for i in range(STEPS)]

    def cancel(done, total):
        seen.append("cancelled")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(net, schedule, on_step=cancel)
    assert seen[STEPS:] == ["cancelled"]


def test_a_profile_holds_the_steady_steps(net, schedule, tmp_path):
    _, progress, _ = run(net, schedule, profile=tmp_path / "deep" / "profile")
    written = Path(progress.notes["profile"])
    assert written.is_relative_to(tmp_path / "deep" / "profile") and list(written.glob("*.xplane.pb"))
    trace = written / "perfetto_trace.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {int(e["args"]["step_num"]) for e in events if e.get("name") == "denoise" and "step_num" in e.get("args", {})}
    assert steps == set(range(1, 1 + PROFILED_STEPS))


def test_every_run_has_a_profile_of_its_own(net, schedule, tmp_path):
    """Also two in one second, whose folders JAX would give one name. Writing it is a phase of its own within the loop's."""
    runs = [run(net, schedule, profile=tmp_path)[1] for _ in range(2)]
    assert len({progress.notes["profile"] for progress in runs}) == 2
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 2
    assert all(progress.begun[-2:] == ["denoise", "write profile"] for progress in runs)


def test_a_stopped_run_ends_its_profile(net, schedule, tmp_path):
    def cancel(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(net, schedule, profile=tmp_path / "a", on_step=cancel)
    run(net, schedule, profile=tmp_path / "b")  # fails where a profile is still running
    assert list((tmp_path / "a").rglob("*.xplane.pb"))


def test_steady_steps():
    assert steady_steps([True] * 50) == range(1, 6)
    assert steady_steps([True]) == range(0, 1)
    assert steady_steps([True, True]) == range(1, 2)
    assert steady_steps(DeepCache().full_steps(50)) == range(15, 20), "a full step, three cached ones, the next full one"


def test_profiles_of_a_folder_end_somewhere(tmp_path, monkeypatch):
    """Also where the system says "there already" of what isn't."""
    monkeypatch.setattr("tpuvid.compute.step_profiler.MOST_PROFILES", 2)
    assert [new_folder(tmp_path).name for _ in range(2)] == ["1", "2"]
    with pytest.raises(TpuvidError, match="choose another"):
        new_folder(tmp_path)
