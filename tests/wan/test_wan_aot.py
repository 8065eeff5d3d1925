"""The denoising step of Wan 2.1 at full size, compiled for real TPUs by libtpu."""

import pytest
from shared.aot import compile_steps

pytestmark = pytest.mark.aot


@pytest.mark.parametrize(
    "model, topology, cache",
    [("wan2.1-t2v-14b", "v6e-8", None), ("wan2.1-t2v-14b", "v6e-8", "deepcache"), ("wan2.1-t2v-1.3b", "v6e-1", None)],
)
def test_step_compiles_and_fits(model, topology, cache):
    found = compile_steps(model, topology, cache=cache)
    print(found)
    full, cached = found["full"], found["cached"]
    assert found["mesh"] == {"v6e-8": {"dp": 2, "sp": 4, "tp": 1}, "v6e-1": {"dp": 1, "sp": 1, "tp": 1}}[topology]
    assert full["gib"] < 31.25, "a v6e chip has 32 GB"
    assert full["attentions"] == 2, "self- and cross-attention run on the Pallas kernel"
    assert full["largest gather"] < 3 * 13824 * 5120, "weights of a block are gathered, no activations"
    if cache:
        assert cached["gib"] < 31.25 and cached["attentions"] == 2 and cached["loops"] < full["loops"], "one block alone"
