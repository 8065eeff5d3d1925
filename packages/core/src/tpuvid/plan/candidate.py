"""The job of one candidate of a search for tile sizes: compiles the kernel for a TPU and counts its cycles."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from tpuvid.compute.kernels.block_sizes import AttentionShape, Blocks
from tpuvid.compute.kernels.flash import attention_flash
from tpuvid.plan.bundles import kernels, pallas_grids
from tpuvid.plan.topologies import parse_topology


def count_cycles(job: Mapping[str, Any]) -> dict[str, Any]:
    """`job` has "topology", "shape", "blocks" and "dump", the folder that libtpu was told to leave schedules in.

    Returns "cycles", or None and a "reason" where the kernel can't be compiled with these blocks.
    """
    shape, blocks, dump = AttentionShape(*job["shape"]), Blocks(*job["blocks"]), Path(job["dump"])
    on_chip = SingleDeviceSharding(parse_topology(job["topology"]).jax_devices()[0])

    inputs = [
        jax.ShapeDtypeStruct((1, shape.heads, tokens, shape.head_dim), jnp.bfloat16, sharding=on_chip)
        for tokens in (shape.queries, shape.keys, shape.keys)
    ]
    try:
        traced = jax.jit(lambda q, k, v: attention_flash(q, k, v, blocks=blocks)).trace(*inputs)
        traced.lower().compile()
        (found,) = kernels(dump, pallas_grids(traced.jaxpr)).values()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "vmem" in str(error).lower():
            return {"cycles": None, "reason": str(error).splitlines()[0]}
        raise
    finally:
        shutil.rmtree(dump, ignore_errors=True)
    return {"cycles": found.cycles, "reason": None}
