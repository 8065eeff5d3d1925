"""The acceptance line of every Wan change: what diffusers computes, tpuvid computes."""

from shared.fidelity import parametrized
from wan.fidelity import CASES, measure


@parametrized(CASES)
def test_every_stage_equals_diffusers(case, tmp_path):
    measure(case, tmp_path).check()
