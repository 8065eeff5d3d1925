"""The denoising step of HunyuanVideo 1.5 at full size, compiled for real TPUs by libtpu."""

import pytest
from shared.aot import compile_steps

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("size, settings", [("720p", {"cache": "deepcache"}), ("480p", {"window_size": 16})])
def test_step_compiles_and_fits(size, settings):
    found = compile_steps(f"hunyuanvideo-1.5-t2v-{size}", **settings)
    print(found)
    full, cached = found["full"], found["cached"]
    assert found["mesh"] == {"dp": 2, "sp": 4, "tp": 1}
    assert full["gib"] < 31.25, "a v6e chip has 32 GB"
    windowed = "window_size" in settings  # then the prompt's queries have a call of their own
    assert full["attentions"] == 3 + windowed, "the refiner's two blocks and the scanned one run on the Pallas kernel"
    if cached:
        assert cached["gib"] < 31.25 and cached["attentions"] == 1 and cached["loops"] < full["loops"], "the last block alone"
