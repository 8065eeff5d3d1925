"""The denoising step of HunyuanVideo 1.5 at full size, compiled for real TPUs by libtpu."""

import pytest
from shared.aot import compile_steps

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("size, cache", [("720p", "deepcache"), ("480p", None)])
def test_step_compiles_and_fits(size, cache):
    found = compile_steps(f"hunyuanvideo-1.5-t2v-{size}", cache=cache)
    print(found)
    full, cached = found["full"], found["cached"]
    assert found["mesh"] == {"dp": 2, "sp": 4, "tp": 1}
    assert full["gib"] < 31.25, "a v6e chip has 32 GB"
    assert full["attentions"] == 3, "the refiner's two blocks and the scanned one run on the Pallas kernel"
    if cache:
        assert cached["gib"] < 31.25 and cached["attentions"] == 1 and cached["loops"] < full["loops"], "the last block alone"
