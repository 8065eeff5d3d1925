"""The denoising step of CogVideoX1.5 at full size, compiled for real TPUs by libtpu."""

import pytest
from shared.aot import compile_steps
from tpuvid_cogvideox.plugin import COGVIDEOX_1_5_5B

pytestmark = pytest.mark.aot

# transformer/config.json of the published checkpoint, as far as it differs from diffusers' defaults
TRANSFORMER = dict(
    sample_height=300, sample_width=300, patch_bias=False, use_rotary_positional_embeddings=True, sample_frames=81
)
SCHEDULER = dict(
    _class_name="CogVideoXDDIMScheduler", prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
)  # fmt: skip


def test_step_compiles_and_fits(tmp_path):
    configs = {"transformer": TRANSFORMER | dict(COGVIDEOX_1_5_5B.signature), "scheduler": SCHEDULER}
    found = compile_steps(tmp_path, "cogvideox1.5-5b", configs, {"prompt_embeds": (1, 226, 4096)}, cache="deepcache")
    print(found)
    assert found["mesh"] == {"dp": 2, "tp": 4}
    assert found["full"]["gib"] < 31.25 and found["cached"]["gib"] < 31.25, "a v6e chip has 32 GB"
    assert found["full"]["kernels"] == 1, "attention over text and video runs on the Pallas kernel"
    assert found["cached"]["kernels"] == 1 and found["cached"]["loops"] < found["full"]["loops"], "one block alone"
