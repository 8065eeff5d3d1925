"""The real denoising step of Wan 2.1 14B, compiled for real TPUs by libtpu: what `generate` runs there."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.aot

SCRIPT = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
import numpy as np
from jax.experimental import topologies
from tpuvid.checkpoint import Checkpoint
from tpuvid.denoising import Moment
from tpuvid.mesh import shard_parameters
from tpuvid.runtime import DTYPES, Runtime, batch_sharded, replicated
from tpuvid.stepcache import DeepCache, Uncached
from tpuvid_wan.denoise import WanDenoiser
from tpuvid_wan.sharding import TRANSFORMER
from pathlib import Path

folder, chips, size, cache = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4])
devices = topologies.get_topology_desc("v6e:2x4", "tpu").devices[:chips]
runtime = Runtime(DTYPES["bfloat16"], devices=devices)
denoiser = WanDenoiser(Checkpoint("wan", folder=folder), runtime)
mesh, everywhere = denoiser.mesh, replicated(denoiser.mesh)

def struct(shape, dtype, sharding=everywhere):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

structs = denoiser.traced.parameters(runtime.dtype)
shardings = shard_parameters(structs, TRANSFORMER, mesh)
params = {k: struct(s.shape, s.dtype, shardings[k]) for k, s in structs.items()}
params |= {k: struct(b.shape, b.dtype) for k, b in denoiser.traced.buffers().items()}
frames, height, width = size
state = struct((4, 1, 16, (frames - 1) // 4 + 1, height // 8, width // 8), np.float32)
text = struct((2, 512, 4096), runtime.dtype, batch_sharded(mesh, 2))
scalar = struct((), np.float32)
moment = Moment(scalar, struct((4, 5), np.float32), scalar, struct((0, *state.shape[1:]), np.float32))
compiled, cached = denoiser.sampler.compile(params, state, text, moment, DeepCache() if cache else Uncached())

def about(compiled):
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    return {
        "gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
        "kernels": hlo.count("tpu_custom_call"), "gathers": hlo.count("all-gather("), "loops": hlo.count(" while("),
    }

print(json.dumps({
    "mesh": dict(mesh.shape), "full": about(compiled), "cached": about(cached) if cached else None, "seconds": runtime.progress.seconds,
}))
"""


CONFIGS = {
    "14B": dict(num_layers=40, num_attention_heads=40, ffn_dim=13824),
    "1.3B": dict(num_layers=30, num_attention_heads=12, ffn_dim=8960),
}


@pytest.mark.parametrize(
    "model, chips, size, cache",
    [("14B", 8, (81, 720, 1280), False), ("14B", 8, (81, 720, 1280), True), ("1.3B", 1, (81, 480, 832), False)],
)
def test_step_compiles_and_fits(tmp_path, python_env, model, chips, size, cache):
    for component, file, config in (
        ("transformer", "config.json", CONFIGS[model] | {"attention_head_dim": 128, "text_dim": 4096}),
        ("scheduler", "scheduler_config.json", {}),
    ):
        (tmp_path / component).mkdir()
        (tmp_path / component / file).write_text(json.dumps(config))
    env = python_env | {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v6e-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path), str(chips), json.dumps(size), json.dumps(cache)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["mesh"] == {8: {"dp": 2, "tp": 4}, 1: {"dp": 1, "tp": 1}}[chips]
    full, cached = found["full"], found["cached"]
    assert full["gib"] < 31.25, "a v6e chip has 32 GB"
    assert full["kernels"] >= 2, "self- and cross-attention run on the Pallas kernel"
    assert full["gathers"] == 0, "no activation is gathered whole"
    if cache:
        assert cached["gib"] < 31.25 and cached["kernels"] == 2 and cached["loops"] < full["loops"], "one block alone"
