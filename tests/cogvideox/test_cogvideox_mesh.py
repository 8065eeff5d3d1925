import jax
import numpy as np
import pytest
from cogvideox.conftest import SMALL
from diffusers import CogVideoXTransformer3DModel
from jax.sharding import Mesh
from shared.mesh_parity import LAYOUTS, STRIPS, on_eight_devices
from tpuvid.compute.mesh import shard_parameters
from tpuvid.family import T5_RULES, TracedModule, build
from tpuvid_cogvideox.conformance import RandomCogVideoX
from tpuvid_cogvideox.denoise import BLOCKS
from tpuvid_cogvideox.plugin import COGVIDEOX_1_5_5B
from tpuvid_cogvideox.sharding import TRANSFORMER
from transformers import T5Config, T5EncoderModel


@pytest.fixture(scope="module")
def parity(request, tmp_path_factory):
    folder = RandomCogVideoX(heads=4, dpm=True).save(tmp_path_factory.mktemp("mesh") / "four-heads")
    return on_eight_devices(request, folder, SMALL, "transformer_blocks.*.attn1.to_q.weight")


@pytest.fixture(scope="module")
def results(parity):
    return parity["layouts"]


@LAYOUTS
def test_every_layout_gives_the_single_device_result(results, mesh):
    assert max(results[str(mesh)]["errors"]) <= 1e-5


@STRIPS
def test_frames_in_strips_are_those_of_one_device(parity, size, parts):
    assert parity["strips"][str(size)]["parts"] == parts
    assert parity["strips"][str(size)]["error"] <= 1e-5


def test_videos_of_a_batch_are_split_over_dp(parity):
    assert parity["batch"]["mesh"] == {"dp": 4, "sp": 1, "tp": 2}
    assert max(parity["batch"]["errors"]) <= 1e-5


def test_layouts_are_really_used(results):
    assert results["dp=2,tp=4"]["spec"] == [None, "tp", None] and results["dp=2,sp=4,fsdp"]["spec"][1:] != [None, None]


@pytest.mark.slow
def test_eight_devices_get_a_layout_by_themselves(results):
    assert results["None"]["mesh"] == {"dp": 2, "sp": 4, "tp": 1}, "eight devices, guidance"


def test_rules_fit_the_full_size_model():
    """Parameter count as published, every rule used, tp = 4 dividing all: on meta tensors."""
    spec = COGVIDEOX_1_5_5B
    mesh = Mesh(np.array([jax.devices()[0]] * 8).reshape(2, 4), ("dp", "tp"))
    # transformer/config.json of the published checkpoint, as far as it differs from diffusers' defaults
    config = dict(
        sample_height=300, sample_width=300, patch_bias=False, use_rotary_positional_embeddings=True, sample_frames=81
    )
    module = build(lambda: CogVideoXTransformer3DModel(**config, **spec.signature))
    parameters = TracedModule(module, scan={"transformer_blocks": BLOCKS}).parameters(np.dtype(np.float32))
    count = sum(int(np.prod(s.shape)) for s in parameters.values())
    assert f"{count / 1e9:.1f}B" == spec.parameters
    shardings = shard_parameters(parameters, TRANSFORMER, mesh)
    split = sum(int(np.prod(parameters[k].shape)) for k, s in shardings.items() if "tp" in s.spec)
    assert split > 0.84 * count, "the rest is mostly the modulation of each block"
    t5_xxl = T5Config(
        d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128, feed_forward_proj="gated-gelu"
    )
    encoder = TracedModule(build(lambda: T5EncoderModel(t5_xxl))).parameters(np.dtype(np.float32))
    shard_parameters(encoder, T5_RULES, mesh)
