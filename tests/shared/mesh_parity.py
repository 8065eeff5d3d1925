"""Every layout of eight CPU devices, and frames in strips, against one device. `on_eight_devices` runs this module in a process
of its own."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ONE = "dp=1"
MESHES = ("dp=2,tp=4", "dp=2,sp=4,fsdp", "sp=3", "sp=8", None)
"""None: dp=2,sp=4. Three parts divide neither heads nor tokens; eight share four heads."""
SIZES = ((8, 6), (6, 13), (6, 14))  # latents: eight strips by height; seven by width, of which the last is half empty, or full
QUICK = 2
"""So many of the layouts and of the sizes; the others are of the tier `slow`."""
LAYOUTS = pytest.mark.parametrize("mesh", [*MESHES[:QUICK], *(pytest.param(m, marks=pytest.mark.slow) for m in MESHES[QUICK:])])
STRIPS = pytest.mark.parametrize(
    "size, parts", [(SIZES[0], 8), (SIZES[1], 7), pytest.param(SIZES[2], 7, marks=pytest.mark.slow)], ids=str
)
SAVING = dict(num_inference_steps=5, cache="deepcache", cache_start_step=1, cache_step_interval=3, window_size="frames=0")


def on_eight_devices(request: pytest.FixtureRequest, folder: Path, settings: dict, weight: str) -> dict:
    """What the tests of `request`'s module that are to run want, in one process, or no more than its quick ones want.

    Under "layouts", by layout: the relative errors of embeddings and latents (with DeepCache and a window too), how `weight`
    is split, and the meshes. Under "strips", by size: the relative error of frames, and into how many strips they were split.
    Under "batch": those of two videos in one batch over dp=4, against each alone on one device.
    """
    mine = [item for item in request.session.items if item.path == request.path]
    upto = None if any(item.get_closest_marker("slow") for item in mine) else QUICK
    return _in_child("main", str(folder), settings, weight, MESHES[:upto], SIZES[:upto])


def strips_on_eight_devices(model: str, decoder: str) -> dict:
    """The "strips" alone, of the first two sizes, by another decoder than the model's own."""
    return _in_child("in_strips", model, decoder, SIZES[:QUICK])


def _in_child(function: str, *args: Any) -> Any:
    env = {k: v for k, v in os.environ.items() if not k.startswith("TPUVID_")}
    flags = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    env |= {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "ignore", "-m", "shared.mesh_parity", function, json.dumps(args)]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def main(folder: str, settings: dict, weight: str, meshes: Sequence[str | None], sizes: Sequence[Sequence[int]]) -> dict:
    import jax
    import numpy as np
    import tpuvid

    assert len(jax.devices()) == 8
    results, expected = {}, None
    for mesh in (ONE, *meshes):
        pipe = tpuvid.load(folder, mesh=mesh)
        conditioning = pipe.encode('a red "cat"', "dog", max_sequence_length=40)
        latents, saved = (pipe.denoise(conditioning, **settings | changes) for changes in ({}, SAVING))
        found = [value for name, value in conditioning.tensors.items() if "mask" not in name and value.any()]
        assert saved.history["denoise"]["window"].startswith("0 frames of tokens")
        found += [latents.latents, saved.latents]
        expected = expected or found
        denoiser, encoder = pipe._opened["denoise"], pipe._opened["encode"]
        results[str(mesh)] = {
            "errors": [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, expected, strict=True)],
            "spec": list(denoiser.params[weight].sharding.spec),
            "mesh": dict(denoiser.mesh.shape),
            "encoders": [dict(e.mesh.shape) for e in (encoder, *vars(encoder).values()) if hasattr(e, "mesh")],
        }
    return {"layouts": results, "strips": in_strips(folder, None, sizes), "batch": in_batch(folder, settings)}


def in_batch(folder: str, settings: dict) -> dict:
    import numpy as np
    import tpuvid

    alone, together = tpuvid.load(folder, mesh="dp=1"), tpuvid.load(folder, mesh="dp=4,tp=2")
    configs = [
        alone.spec.configure(**settings | {"prompt": prompt, "seed": i}) for i, prompt in enumerate(('a red "cat"', "a dog"))
    ]
    conditionings = [alone.encode_config(config, negative=True) for config in configs]
    found = together.denoise_batch(conditionings, configs)
    expected = [alone.denoise_config(*each) for each in zip(conditionings, configs, strict=True)]
    errors = [
        float(np.abs(a.latents - b.latents).max() / np.abs(b.latents).max()) for a, b in zip(found, expected, strict=True)
    ]
    return {"errors": errors, "mesh": dict(together._opened["denoise"].mesh.shape)}


def in_strips(model: str, decoder: str | None, sizes: Sequence[Sequence[int]]) -> dict:
    import jax
    import numpy as np
    from tpuvid.compute.runtime import Runtime
    from tpuvid.compute.stage_loader import open_stage
    from tpuvid.plugin.lookup import resolve_model

    spec, checkpoint = resolve_model(model, decoder=decoder)
    decoders = [open_stage(spec, "decode", checkpoint, Runtime.create(devices=jax.devices()[:n])) for n in (8, 1)]
    for decoder in decoders:
        decoder.load()
    results = {}
    for size in sizes:
        latents = np.random.default_rng(0).standard_normal((1, decoders[0].channels, 3, *size), np.float32)
        chunks = [[chunk["frames"] for chunk in decoder.decode({"latents": latents})] for decoder in decoders]
        found, expected = (np.concatenate(frames, axis=1) for frames in chunks)
        assert found.shape == expected.shape
        error = float(np.abs(found - expected).max() / np.abs(expected).max())
        results[str(tuple(size))] = {"error": error, "parts": decoders[0].mesh.size}
    return results


if __name__ == "__main__":
    gc.set_threshold(100_000)  # imports make a million objects, none of which is garbage
    function, args = sys.argv[1:]
    print(json.dumps({"main": main, "in_strips": in_strips}[function](*json.loads(args))), flush=True)
    os._exit(0)  # what Python would do next takes seconds and helps nobody
