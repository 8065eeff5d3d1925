"""The denoising programs that `generate` would run on TPU v6e chips, compiled by libtpu on this machine; nothing is computed.

`compile_steps` runs this module in a process of its own: the denoiser's own `denoise` prepares everything up to the loop,
with structs in the place of device arrays.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

from tpuvid.registry import registry

# libtpu must not look for a cloud machine, nor be kept from running beside another compile
TPU_ENV = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def compile_steps(folder: Path, model: str, configs: dict, tensors: dict, *, chips: int = 8, **settings) -> dict:
    """What the compiler says of the full step and, with a cache, of the cached one.

    `configs`: by component (of "transformer", "scheduler", "guider") its config; `tensors`: by name the shape of the
    conditioning, of a prompt alone; `settings`: what differs from the model's defaults.
    """
    files = {"transformer": "config.json"}
    for component, config in configs.items():
        (folder / component).mkdir()
        (folder / component / files.get(component, f"{component}_config.json")).write_text(json.dumps(config))
    arguments = model, str(folder), str(chips), json.dumps(tensors), json.dumps(settings)
    command = [sys.executable, "-W", "ignore", "-m", "shared.aot", *arguments]
    done = subprocess.run(command, env=os.environ | TPU_ENV, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def main(model: str, folder: str, chips: int, tensors: dict, settings: dict) -> dict:
    import jax

    jax.config.update("jax_platforms", "cpu")
    import numpy as np
    from jax.experimental import topologies
    from tpuvid.checkpoint import Checkpoint
    from tpuvid.denoising import first_moment
    from tpuvid.mesh import shard_parameters
    from tpuvid.runtime import DTYPES, Runtime, replicated
    from tpuvid.sampling import initial_state

    def struct(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    spec = registry().get(model)
    runtime = Runtime(DTYPES["bfloat16"], devices=topologies.get_topology_desc("v6e:2x4", "tpu").devices[:chips])
    denoiser = spec.load("denoiser", Checkpoint(model, folder=Path(folder)), runtime)
    rules = importlib.import_module(f"{spec.load_denoiser.split('.')[0]}.sharding").TRANSFORMER
    structs = denoiser.traced.parameters(runtime.dtype)
    shardings = shard_parameters(structs, rules, denoiser.mesh)
    everywhere = replicated(denoiser.mesh)
    denoiser.params = {name: struct(s, shardings[name]) for name, s in structs.items()}
    denoiser.params |= {name: struct(b, everywhere) for name, b in denoiser.traced.buffers().items()}

    config = denoiser.resolve(spec.configure(**settings))
    conditioning = {
        f"{sign}{name}": np.broadcast_to(np.float32(1), shape) for sign in ("", "negative_") for name, shape in tensors.items()
    }
    device_put = lambda tree, sharding: jax.tree.map(lambda x: struct(x, sharding), tree)  # noqa: E731
    with mock.patch.object(jax, "device_put", device_put), mock.patch.object(denoiser.sampler, "sample") as sample:
        sample.return_value = np.zeros((1,) * 5, np.float32)
        denoiser.denoise(conditioning, config, lambda done, total: None)
    (params, inputs, noise, schedule), options = sample.call_args
    state = struct(initial_state(noise, schedule), everywhere)
    moment = first_moment(schedule, options["scales"], noise.shape)
    full, cached = denoiser.sampler.compile(params, state, inputs, moment, options["cache"])

    def about(compiled) -> dict:
        memory, hlo = compiled.memory_analysis(), compiled.as_text()
        return {
            "gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
            "kernels": hlo.count("tpu_custom_call"),
            "gathers": hlo.count("all-gather("),
            "loops": hlo.count(" while("),
        }

    return {
        "mesh": dict(denoiser.mesh.shape),
        "full": about(full),
        "cached": about(cached) if cached else None,
        "seconds": runtime.progress.seconds,
    }


if __name__ == "__main__":
    model, folder, chips, tensors, settings = sys.argv[1:]
    print(json.dumps(main(model, folder, int(chips), json.loads(tensors), json.loads(settings))))
