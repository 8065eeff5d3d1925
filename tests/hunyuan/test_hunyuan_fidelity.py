"""The acceptance line of every HunyuanVideo change: what diffusers computes, tpuvid computes."""

import pytest
from hunyuan.fidelity import CASES, measure


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_stage_equals_diffusers(case, tmp_path):
    found = measure(case, tmp_path)
    assert found.embeds <= 1e-4
    assert found.latents <= 1e-4
    assert found.decoded <= 1e-4
    assert found.frames <= 2
