"""The real denoising step of HunyuanVideo 1.5, compiled for real TPUs by libtpu: what `generate` runs there."""

import json
import subprocess
import sys

import pytest
from tpuvid_hunyuan.plugin import HUNYUAN_480P, HUNYUAN_720P

pytestmark = pytest.mark.aot

SCRIPT = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
import numpy as np
from jax.experimental import topologies
from tpuvid.checkpoint import Checkpoint
from tpuvid.mesh import shard_parameters
from tpuvid.runtime import DTYPES, Runtime, batch_sharded, replicated
from tpuvid_hunyuan.denoise import HunyuanDenoiser, TextStreams
from tpuvid_hunyuan.sharding import TRANSFORMER
from pathlib import Path

folder, (frames, height, width) = Path(sys.argv[1]), json.loads(sys.argv[2])
devices = topologies.get_topology_desc("v6e:2x4", "tpu").devices
runtime = Runtime(DTYPES["bfloat16"], devices=devices)
denoiser = HunyuanDenoiser(Checkpoint("hunyuan", folder=folder), runtime)
mesh = denoiser.mesh

def struct(*shape, dtype=np.float32, sharding=replicated(mesh)):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

def halves(*shape, dtype=runtime.dtype):
    return struct(*shape, dtype=dtype, sharding=batch_sharded(mesh, 2))

structs = denoiser.traced.parameters(runtime.dtype)
shardings = shard_parameters(structs, TRANSFORMER, mesh)
params = {k: struct(*s.shape, dtype=s.dtype, sharding=shardings[k]) for k, s in structs.items()}
grid = (frames - 1) // 4 + 1, height // 16, width // 16
streams = TextStreams(
    halves(2, 1000, 3584), halves(2, 1000, dtype=np.int32), halves(2, 256, 1472), halves(2, 256, dtype=np.int32)
)
rotary = (struct(int(np.prod(grid)), 128),) * 2
arguments = params, struct(1, 1, 32, *grid), streams, rotary, struct(), struct(1, 2), struct()
compiled = denoiser.programs.get("denoiser", denoiser._function(True), *arguments, donate=(1,))
memory = compiled.memory_analysis()
hlo = compiled.as_text()
print(json.dumps({
    "mesh": dict(mesh.shape), "gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
    "kernels": hlo.count("tpu_custom_call"), "gathers": hlo.count("all-gather("), "seconds": runtime.progress.seconds,
}))
"""


@pytest.mark.parametrize("spec", [HUNYUAN_720P, HUNYUAN_480P], ids=lambda spec: spec.model_id)
def test_step_compiles_and_fits(tmp_path, python_env, spec):
    for component, file, config in (
        ("transformer", "config.json", dict(spec.signature)),
        ("scheduler", "scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}),
        ("guider", "guider_config.json", {"_class_name": "ClassifierFreeGuidance"}),
    ):
        (tmp_path / component).mkdir()
        (tmp_path / component / file).write_text(json.dumps(config))
    env = python_env | {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v6e-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    size = spec.defaults.num_frames, spec.defaults.height, spec.defaults.width
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path), json.dumps(size)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["mesh"] == {"dp": 2, "tp": 4}
    assert found["gib"] < 31.25, "a v6e chip has 32 GB"
    assert found["kernels"] >= 3, "the refiner's two blocks and the scanned one run on the Pallas kernel"
