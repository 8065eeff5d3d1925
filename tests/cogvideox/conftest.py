import pytest
import tpuvid
from tpuvid_cogvideox.conformance import RandomCogVideoX

SMALL = dict(height=32, width=48, num_frames=9, num_inference_steps=3, guidance_scale=3.0, seed=7)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return RandomCogVideoX(dpm=True).save(tmp_path_factory.mktemp("checkpoints") / "random-cogvideox")


@pytest.fixture(scope="session")
def pipe(checkpoint):
    return tpuvid.load(str(checkpoint))
