"""Run by test_cogvideox_mesh.py in a process of its own with eight CPU devices: every layout against one device."""

import json
import sys

import jax
import numpy as np
import tpuvid
from cogvideox.conftest import SMALL

folder = sys.argv[1]
assert len(jax.devices()) == 8
CACHED = dict(num_inference_steps=5, cache="deepcache", cache_start_step=1, cache_step_interval=3)
results = {}
expected = None
for mesh in ("dp=1,tp=1", "dp=2,tp=1", "dp=1,tp=2", "dp=1,tp=4", None):
    pipe = tpuvid.load(folder, mesh=mesh)
    conditioning = pipe.encode("a red cat", "dog")
    latents = pipe.denoise(conditioning, **SMALL)
    cached = pipe.denoise(conditioning, **SMALL | CACHED)
    found = [conditioning.tensors["prompt_embeds"], latents.latents, cached.latents]
    expected = expected or found
    denoiser = pipe._opened["denoise"]
    sharded = denoiser.params["transformer_blocks.*.attn1.to_q.weight"].sharding
    results[str(mesh)] = {
        "errors": [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, expected)],
        "spec": list(sharded.spec),
        "mesh": dict(denoiser.mesh.shape),
    }
print(json.dumps(results))
