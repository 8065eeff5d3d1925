"""The acceptance line of every CogVideoX change: what diffusers computes, tpuvid computes."""

from cogvideox.fidelity import CASES, measure
from shared.fidelity import parametrized


@parametrized(CASES)
def test_every_stage_equals_diffusers(case, tmp_path):
    measure(case, tmp_path).check()
