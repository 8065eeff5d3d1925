"""One candidate of a search for tile sizes, in a process of its own: compiles the kernel for a TPU and counts its cycles.

    python -m tpuvid.plan.candidate '{"topology": "v6e-8", "shape": [5, 75600, 75600, 128, false], "blocks": [2944, 2048, 1024]}'

Prints {"cycles": …} or, where the kernel can't be compiled with these tiles, {"infeasible": why}. The process and its
folder of dumps live as long as its standard input is open: it ends with the process that started it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from tpuvid.kernels.block_sizes import AttentionShape, Blocks
from tpuvid.plan.bundles import dump_flags, kernels
from tpuvid.plan.topologies import Topology, parse_topology

FOLDER = "tpuvid-tune-"


def main(job: str) -> None:
    folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-"))
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    try:
        given = json.loads(job)
        topology = parse_topology(given["topology"])
        # libtpu reads it while it starts, which is later than importing jax
        os.environ.update(topology.environment(dump_flags(folder)))
        found = _count(topology, AttentionShape(*given["shape"]), Blocks(*given["blocks"]), folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(found), flush=True)


def remove_stale_folders() -> None:
    """What candidates left that were killed before they could clean up."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        owner = re.match(rf"{FOLDER}(\d+)-", folder.name)
        if owner and not _is_alive(int(owner[1])):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _end_with_parent(folder: Path) -> None:
    while os.read(sys.stdin.fileno(), 1):  # unbuffered: the interpreter can't shut down while a buffered read waits
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _count(topology: Topology, shape: AttentionShape, blocks: Blocks, folder: Path) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from tpuvid.kernels.splash import attention_splash

    jax.config.update("jax_enable_compilation_cache", False)  # what is found there isn't compiled, and dumps nothing
    on_chip = SingleDeviceSharding(topology.jax_devices()[0])

    def struct(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=on_chip)

    inputs = [struct(1, shape.heads, n, shape.head_dim) for n in (shape.queries, shape.keys, shape.keys)]
    mask = struct(1, shape.keys, dtype=bool) if shape.masked else None
    try:
        jax.jit(lambda q, k, v, m: attention_splash(q, k, v, kv_mask=m, blocks=blocks)).lower(*inputs, mask).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "vmem" in str(error).lower():
            return {"infeasible": str(error).splitlines()[0]}
        raise
    (found,) = kernels(folder).values()
    return {"cycles": found.cycles}


if __name__ == "__main__":
    main(sys.argv[1])
