"""Run by test_hunyuan_mesh.py in a process of its own with eight CPU devices: every layout against one device."""

import json
import sys

import jax
import numpy as np
import tpuvid
from hunyuan.conftest import SMALL

folder = sys.argv[1]
assert len(jax.devices()) == 8
CACHED = dict(num_inference_steps=5, cache="deepcache", cache_start_step=1, cache_step_interval=3)
results = {}
expected = None
for mesh in ("dp=1,tp=1", "dp=2,tp=1", "dp=1,tp=2", "dp=1,tp=4", None):
    pipe = tpuvid.load(folder, mesh=mesh)
    conditioning = pipe.encode('a red "cat"', "dog", max_sequence_length=40)
    latents = pipe.denoise(conditioning, **SMALL).latents
    cached = pipe.denoise(conditioning, **SMALL | CACHED).latents
    found = [conditioning.tensors["prompt_embeds"], conditioning.tensors["prompt_embeds_2"], latents, cached]
    expected = expected or found
    denoiser, encoder = pipe._opened["denoise"], pipe._opened["encode"]
    results[str(mesh)] = {
        "errors": [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, expected)],
        "spec": list(denoiser.params["transformer_blocks.*.attn.add_q_proj.weight"].sharding.spec),
        "mesh": dict(denoiser.mesh.shape),
        "text": dict(encoder.text.mesh.shape),
        "glyphs": dict(encoder.glyphs.mesh.shape),
    }
print(json.dumps(results))
