"""The job of one candidate of a search for tile sizes: compiles the kernel for a TPU and counts its cycles."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from tpuvid.kernels.block_sizes import AttentionShape, Blocks
from tpuvid.kernels.splash import attention_splash
from tpuvid.plan.bundles import kernels
from tpuvid.plan.jobs import Report
from tpuvid.plan.topologies import parse_topology


def count_cycles(job: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """`job` has "topology", "shape", "blocks" and "dump", the folder that libtpu was told to leave schedules in.

    Returns "cycles", or None and a "reason" where the kernel can't be compiled with these blocks.
    """
    shape, blocks, dump = AttentionShape(*job["shape"]), Blocks(*job["blocks"]), Path(job["dump"])
    on_chip = SingleDeviceSharding(parse_topology(job["topology"]).jax_devices()[0])

    def struct(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=on_chip)

    inputs = [struct(1, shape.heads, n, shape.head_dim) for n in (shape.queries, shape.keys, shape.keys)]
    mask = struct(1, shape.keys, dtype=bool) if shape.masked else None
    try:
        jax.jit(lambda q, k, v, m: attention_splash(q, k, v, kv_mask=m, blocks=blocks)).lower(*inputs, mask).compile()
        (found,) = kernels(dump).values()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "vmem" in str(error).lower():
            return {"cycles": None, "reason": str(error).splitlines()[0]}
        raise
    finally:
        shutil.rmtree(dump, ignore_errors=True)
    return {"cycles": found.cycles, "reason": None}
