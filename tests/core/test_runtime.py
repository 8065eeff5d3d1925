from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from tpuvid import InputError
from tpuvid.compute.kernels.placement import placement
from tpuvid.compute.mesh import make_mesh
from tpuvid.compute.progress import Progress, current
from tpuvid.compute.runtime import describe_mesh
from tpuvid.contract import MeshConfig
from tpuvid.family import Runtime

TPU = SimpleNamespace(platform="tpu", id=0)


def test_text_encoders_run_on_the_cpu_beside_an_accelerator():
    """Also where the denoiser's attention is a kernel that a CPU does not have."""
    runtime = Runtime(np.dtype(np.float32), devices=[TPU], attention_backend="splash", text_encoder_device="cpu")
    mesh = runtime.encoder_mesh([4])
    assert mesh.devices.flat[0].platform == "cpu" and mesh.size == 1
    with runtime.scope(mesh):
        assert (placement().platform, placement().attention_backend) == ("cpu", "auto")
    assert not runtime.text_encoder_shares_memory
    assert replace(runtime, text_encoder_device="device").text_encoder_shares_memory


def test_on_a_cpu_nothing_is_freed_for_the_denoiser():
    assert not Runtime.create().text_encoder_shares_memory


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(text_encoder_device="gpu"), "text_encoder_device='gpu': choose from device, cpu"),
        (dict(warmup_steps=-1), "warmup_steps=-1: needs a whole number"),
        (dict(profile=__file__), "test_runtime.py: is no folder to write to"),
        (dict(profile="/dev/null/profile"), "/dev/null/profile: is no folder to write to"),
        (dict(profile=3), "profile=3: needs the path of a folder"),
        (dict(dtype="int8"), "dtype='int8': choose from"),
        (dict(attention_backend="splash"), "runs on tpu, these devices are cpu"),
    ],
)
def test_what_this_machine_cannot_do_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        Runtime.create(**options)


def test_the_record_says_where_programs_ran():
    runtime = Runtime.create()
    for _ in range(2):
        runtime.programs(make_mesh(MeshConfig(), runtime.devices)).get("f", lambda x: x + 1, np.zeros(3, np.float32))
    assert current().take()["devices"] == "1 × cpu"
    mesh = SimpleNamespace(size=8, shape={"dp": 2, "tp": 4}, devices=np.array([[SimpleNamespace(device_kind="TPU v6 lite")]]))
    assert describe_mesh(mesh) == "8 × TPU v6 lite, dp=2, tp=4"


def test_a_phase_within_another_counts_by_itself(monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 5.0, 7.0, 10.0])  # outer begins; inner begins and ends, twice; outer ends
    monkeypatch.setattr("tpuvid.compute.progress.time.perf_counter", lambda: next(clock))
    progress = Progress()
    with progress.phase("outer"):
        for _ in range(2):
            with progress.phase("inner"):
                pass
    assert progress.seconds == {"inner": 5.0, "outer": 5.0}
