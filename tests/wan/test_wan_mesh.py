import numpy as np
import pytest
from shared.mesh_parity import LAYOUTS, STRIPS, on_eight_devices
from tpuvid.compute.mesh import shard_parameters
from tpuvid.family import T5_RULES, TracedModule, build
from tpuvid_wan.conformance import RandomWan
from tpuvid_wan.denoise import BLOCKS
from tpuvid_wan.plugin import WAN_1_3B, WAN_14B
from tpuvid_wan.sharding import TRANSFORMER
from wan.conftest import SMALL


@pytest.fixture(scope="module")
def parity(request, tmp_path_factory):
    folder = RandomWan(heads=4).save(tmp_path_factory.mktemp("mesh") / "four-heads")
    return on_eight_devices(request, folder, SMALL, "blocks.*.attn1.to_q.weight")


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


@pytest.mark.parametrize("spec", [WAN_14B, WAN_1_3B], ids=lambda s: s.model_id)
def test_rules_fit_the_full_size_models(spec):
    """Parameter counts as published, every rule used, tp = 4 dividing all: on meta tensors."""
    import jax
    from diffusers import WanTransformer3DModel
    from jax.sharding import Mesh
    from transformers import UMT5Config, UMT5EncoderModel

    width = spec.signature["num_attention_heads"] * spec.signature["attention_head_dim"]
    ffn = {5120: 13824, 1536: 8960}[width]
    mesh = Mesh(np.array([jax.devices()[0]] * 8).reshape(2, 4), ("dp", "tp"))
    module = build(lambda: WanTransformer3DModel(text_dim=4096, ffn_dim=ffn, **spec.signature))
    parameters = TracedModule(module, scan={"blocks": BLOCKS}).parameters(np.dtype(np.float32))
    count = sum(int(np.prod(s.shape)) for s in parameters.values())
    assert f"{count / 1e9:.1f}B" == spec.parameters
    shardings = shard_parameters(parameters, TRANSFORMER, mesh)
    split = sum(int(np.prod(parameters[k].shape)) for k, s in shardings.items() if "tp" in s.spec)
    assert split > 0.9 * count
    if spec is WAN_14B:
        config = UMT5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=256384)
        encoder = TracedModule(build(lambda: UMT5EncoderModel(config))).parameters(np.dtype(np.float32))
        shard_parameters(encoder, T5_RULES, mesh)
