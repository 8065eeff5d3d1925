"""A small program compiled by libtpu for a v6e-8: what is counted of it against what is known of it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tpuvid.plan.bundles import dump_flags
from tpuvid.plan.cost import predict
from tpuvid.plan.jobs import Jobs
from tpuvid.plan.schedules import schedule_cycles
from tpuvid.plan.topologies import parse_topology

pytestmark = pytest.mark.aot

TOPOLOGY = parse_topology("v6e-8")
LAYERS, TOKENS, WIDTH = 6, 8192, 4096


def compile_scanned_matmuls(argument):
    """A job: x ← x · w_i for every layer, rows of w_i over four devices, so that each product ends in an all-reduce."""
    mesh = Mesh(np.array(TOPOLOGY.jax_devices()).reshape(2, 4), ("dp", "tp"))

    def step(x, weights):
        return jax.lax.scan(lambda x, w: (jax.nn.gelu(x @ w), None), x, weights)[0]

    def struct(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    arguments = struct((2, TOKENS, WIDTH), "dp"), struct((LAYERS, WIDTH, WIDTH), None, "tp")
    compiled = jax.jit(step).lower(*arguments).compile()
    return {"hlo": compiled.as_text(), "coords": [list(device.coords) for device in mesh.devices.flat]}


def test_flops_are_exact_and_time_respects_the_peak(tmp_path):
    with Jobs(tmp_path) as jobs:
        environment = TOPOLOGY.environment(dump_flags(tmp_path)) | {"PYTHONPATH": str(Path(__file__).parent)}
        jobs.start("matmuls", f"{Path(__file__).stem}:compile_scanned_matmuls", {}, environment)
        *_, (_, done) = jobs.events()
    found = done["result"]
    prediction = predict(found["hlo"], TOPOLOGY, coords=found["coords"], schedule_cycles=schedule_cycles(tmp_path))
    print(prediction)

    flops = LAYERS * 2 * TOKENS * WIDTH * WIDTH / 4
    assert prediction.flops == flops
    assert prediction.reason is None and not prediction.notes
    at_peak = flops / 918e12
    assert at_peak <= prediction.parts["matmul"].seconds < 2 * at_peak
    assert prediction.parts["matmul"].estimated_seconds == 0, "all schedules were counted"
    (reduce,) = [c for c in prediction.collectives if c.kind == "all-reduce"]
    assert (reduce.group, reduce.count, reduce.bytes) == (4, LAYERS, TOKENS * WIDTH * 2)
    assert reduce.seconds == pytest.approx(LAYERS * 3 / 4 * TOKENS * WIDTH * 2 / 90e9)
    assert prediction.seconds == pytest.approx(sum(part.seconds for part in prediction.parts.values()))
