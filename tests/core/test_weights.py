import json
import subprocess
import sys

import numpy as np
from safetensors.numpy import save_file

MEASURE = '''
import json, sys, threading, time
import jax, numpy as np
from pathlib import Path
from torch import nn
from tpuvid.family import Scan, TracedModule, Weights, build, load_parameters
from tpuvid.compute.mesh import make_mesh
from tpuvid.contract import MeshConfig

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(8)) for _ in range(32))

def resident():
    """Memory of our own: mapped files are the kernel's to drop."""
    (line,) = (line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

dtype = np.dtype(sys.argv[2])
jax.block_until_ready(jax.device_put(np.ones(10)))
traced = TracedModule(build(Model), scan={"blocks": Scan(1)})
before = peak = resident()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
folder = Path(sys.argv[1])
params = load_parameters(traced, Weights(sorted(folder.glob("*.safetensors"))), mesh=make_mesh(MeshConfig()), dtype=dtype)
jax.block_until_ready(params)
done = True
thread.join()
size = sum(p.nbytes for p in params.values())
print(json.dumps({"size": size, "peak": peak - before, "check": float(params["blocks.*.3.weight"][31, 5, 7])}))
'''


def test_loading_holds_no_second_copy(tmp_path):
    """Eight stacks of 32 MiB: on a CPU, where device arrays are host memory, one stack may be there twice, the model not."""
    rng = np.random.default_rng(0)
    values = {f"blocks.{i}.{j}.weight": rng.random((512, 512), dtype=np.float32) for i in range(32) for j in range(8)}
    for part in range(4):
        save_file({k: v for k, v in values.items() if int(k.split(".")[1]) % 4 == part}, tmp_path / f"{part}.safetensors")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, str(tmp_path), "float32"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["size"] == 8 * 32 * 512 * 512 * 4
    assert found["check"] == values["blocks.31.3.weight"][5, 7]
    print(found["peak"] / found["size"])
    assert found["peak"] < 1.4 * found["size"]
