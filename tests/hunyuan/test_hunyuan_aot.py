"""The denoising step of HunyuanVideo 1.5 at full size, compiled for real TPUs by libtpu."""

import pytest
from shared.aot import compile_steps
from tpuvid_hunyuan.plugin import HUNYUAN_480P, HUNYUAN_720P

pytestmark = pytest.mark.aot

TENSORS = {
    "prompt_embeds": (1, 1000, 3584),
    "prompt_embeds_mask": (1, 1000),
    "prompt_embeds_2": (1, 256, 1472),
    "prompt_embeds_mask_2": (1, 256),
}


@pytest.mark.parametrize("spec, cache", [(HUNYUAN_720P, "deepcache"), (HUNYUAN_480P, None)], ids=["720p", "480p"])
def test_step_compiles_and_fits(tmp_path, spec, cache):
    configs = {
        "transformer": dict(spec.signature),
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        "guider": {"_class_name": "ClassifierFreeGuidance", "guidance_scale": 6.0},
    }
    found = compile_steps(tmp_path, spec.model_id, configs, TENSORS, cache=cache)
    print(found)
    full, cached = found["full"], found["cached"]
    assert found["mesh"] == {"dp": 2, "tp": 4}
    assert full["gib"] < 31.25, "a v6e chip has 32 GB"
    assert full["kernels"] >= 3, "the refiner's two blocks and the scanned one run on the Pallas kernel"
    if cache:
        assert cached["gib"] < 31.25 and cached["kernels"] == 1 and cached["loops"] < full["loops"], "the last block alone"
