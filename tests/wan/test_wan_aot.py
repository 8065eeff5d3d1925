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
from tpuvid.mesh import shard_parameters
from tpuvid.runtime import DTYPES, Runtime, batch_sharded, replicated
from tpuvid_wan.denoise import WanDenoiser
from tpuvid_wan.sharding import TRANSFORMER
from pathlib import Path

topology, folder, size = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
devices = topologies.get_topology_desc(topology, "tpu").devices
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
compiled = runtime.compile("denoiser", denoiser._function(True), params, state, text, scalar, struct((4, 5), np.float32), scalar, mesh=mesh, donate=(1,))
memory = compiled.memory_analysis()
hlo = compiled.as_text()
print(json.dumps({
    "mesh": dict(mesh.shape), "gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
    "kernels": hlo.count("tpu_custom_call"), "gathers": hlo.count("all-gather("), "seconds": runtime.progress.seconds,
}))
"""


@pytest.mark.parametrize("topology, accelerator, size", [("v6e:2x4", "v6e-8", (81, 720, 1280)), ("v6e:1x1", "v6e-1", (17, 480, 832))])
def test_wan_14b_step_compiles_and_fits(tmp_path, python_env, topology, accelerator, size):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "scheduler").mkdir()
    blocks = 40 if topology == "v6e:2x4" else 30  # 1.3B on the single chip
    heads = {40: 40, 30: 12}[blocks]
    config = dict(num_layers=blocks, num_attention_heads=heads, attention_head_dim=128, ffn_dim={40: 13824, 30: 8960}[blocks], text_dim=4096)
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{}")
    env = python_env | {
        "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": accelerator, "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_CHIPS_PER_HOST_BOUNDS": "1,1,1", "TPU_HOST_BOUNDS": "1,1,1",
    } if topology == "v6e:1x1" else python_env | {
        "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": accelerator, "TPU_WORKER_HOSTNAMES": "localhost",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT, topology, str(tmp_path), json.dumps(size)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["gib"] < 31.25, "a v6e chip has 32 GB"
    assert found["kernels"] >= 2, "self- and cross-attention run on the Pallas kernel"
    assert found["gathers"] == 0 or topology == "v6e:1x1"
