"""The denoising step of Wan 2.1 at full size, compiled for real TPUs by libtpu."""

import pytest
from shared.aot import compile_steps

pytestmark = pytest.mark.aot


@pytest.mark.parametrize(
    "model, topology, settings",
    [
        ("wan2.1-t2v-14b", "v6e-8", {}),
        ("wan2.1-t2v-14b", "v6e-8", {"cache": "deepcache"}),
        ("wan2.1-t2v-14b", "v6e-4", {"window_size": 8}),
        ("wan2.1-t2v-1.3b", "v6e-1", {}),
        ("wan2.1-t2v-1.3b", "v6e-16", {"window_size": 8}),  # eight parts share twelve heads
    ],
)
def test_step_compiles_and_fits(model, topology, settings):
    found = compile_steps(model, topology, **settings)
    print(found)
    full, cached = found["full"], found["cached"]
    parts = {"v6e-16": (2, 8), "v6e-8": (2, 4), "v6e-4": (2, 2), "v6e-1": (1, 1)}[topology]
    assert (found["mesh"]["dp"], found["mesh"]["sp"]) == parts
    assert full["gib"] < 31.25, "a v6e chip has 32 GB"
    assert full["attentions"] == 2, "self- and cross-attention run on the Pallas kernel"
    assert full["largest gather"] < 3 * 13824 * 5120, "weights of a block are gathered, no activations"
    if cached:
        assert cached["gib"] < 31.25 and cached["attentions"] == 2 and cached["loops"] < full["loops"], "one block alone"
