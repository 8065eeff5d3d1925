"""The denoising step of CogVideoX1.5 at full size, compiled for real TPUs by libtpu."""

import pytest
from shared.aot import compile_steps

pytestmark = pytest.mark.aot


def test_step_compiles_and_fits():
    found = compile_steps("cogvideox1.5-5b", cache="deepcache")
    print(found)
    assert found["mesh"] == {"dp": 2, "sp": 4, "tp": 1}
    assert found["full"]["gib"] < 31.25 and found["cached"]["gib"] < 31.25, "a v6e chip has 32 GB"
    assert found["full"]["attentions"] == 1, "attention over text and video runs on the Pallas kernel"
    assert found["cached"]["attentions"] == 1 and found["cached"]["loops"] < found["full"]["loops"], "one block alone"
