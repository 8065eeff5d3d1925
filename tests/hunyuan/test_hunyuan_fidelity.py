"""The acceptance line of every HunyuanVideo change: what diffusers computes, tpuvid computes."""

import pytest
from hunyuan.fidelity import CASES, measure


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_stage_equals_diffusers(case, tmp_path):
    measure(case, tmp_path).check()
