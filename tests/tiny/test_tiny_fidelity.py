from wan.fidelity import TINY, measure


def test_every_stage_equals_diffusers(tmp_path):
    measure(TINY, tmp_path).check()
