import jax
import numpy as np
import pytest
from diffusers import HunyuanVideo15Transformer3DModel
from hunyuan.conftest import SMALL
from jax.sharding import Mesh
from shared.mesh_parity import LAYOUTS, STRIPS, on_eight_devices
from tpuvid.compute.mesh import shard_parameters
from tpuvid.family import T5_RULES, Scan, TracedModule, build
from tpuvid_hunyuan.conformance import RandomHunyuan
from tpuvid_hunyuan.denoise import BLOCKS
from tpuvid_hunyuan.encode import text_module
from tpuvid_hunyuan.plugin import HUNYUAN_480P, HUNYUAN_720P
from tpuvid_hunyuan.sharding import QWEN, TRANSFORMER
from tpuvid_hunyuan.transformer import build_transformer
from transformers import Qwen2_5_VLTextConfig, T5Config, T5EncoderModel

MESH = Mesh(np.array([jax.devices()[0]] * 8).reshape(2, 4), ("dp", "tp"))


@pytest.fixture(scope="module")
def parity(request, tmp_path_factory):
    folder = RandomHunyuan(heads=4, guider={"start": 0.3, "stop": 0.9}).save(tmp_path_factory.mktemp("mesh") / "four-heads")
    return on_eight_devices(request, folder, SMALL, "transformer_blocks.*.attn.add_q_proj.weight")


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
    assert results["None"]["encoders"] == 2 * [{"dp": 1, "sp": 1, "tp": 2}], "two key heads of the one, two heads of the other"


@pytest.mark.parametrize("spec", [HUNYUAN_720P, HUNYUAN_480P], ids=lambda spec: spec.model_id)
def test_rules_fit_the_full_size_model(spec):
    """Parameter count as published, every rule used, tp = 4 dividing all: on meta tensors."""
    # transformer/config.json of the published checkpoints is diffusers' defaults and these
    config = dict(spec.signature) | {"task_type": "t2v"}
    whole = build(lambda: HunyuanVideo15Transformer3DModel(**config))
    assert f"{sum(p.numel() for p in whole.parameters()) / 1e9:.1f}B" == spec.parameters
    parameters = TracedModule(build_transformer(config), scan={"transformer_blocks": BLOCKS}).parameters(np.dtype(np.float32))
    count = sum(int(np.prod(s.shape)) for s in parameters.values())
    shardings = shard_parameters(parameters, TRANSFORMER, MESH)
    split = sum(int(np.prod(parameters[k].shape)) for k, s in shardings.items() if "tp" in s.spec)
    assert split > 0.64 * count, "the rest is mostly the modulation of each block: 2.7 B"


def test_rules_fit_the_full_size_text_encoders():
    # config.json of Qwen/Qwen2.5-VL-7B-Instruct, as far as shapes go
    qwen = Qwen2_5_VLTextConfig(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4,
    )  # fmt: skip
    parameters = TracedModule(text_module(qwen), scan={"layers": Scan(1)}).parameters(np.dtype(np.float32))
    assert parameters["layers.*.self_attn.k_proj.weight"].shape == (26, 512, 3584), "28 layers, less those not needed"
    shard_parameters(parameters, QWEN, MESH)
    # google/byt5-small with the words of Glyph-SDXL-v2, six heads
    byt5 = T5Config(
        d_model=1472, d_kv=64, d_ff=3584, num_layers=12, num_heads=6, vocab_size=1510, feed_forward_proj="gated-gelu"
    )
    mesh = Mesh(np.array([jax.devices()[0]] * 2).reshape(1, 2), ("dp", "tp"))
    shard_parameters(TracedModule(build(lambda: T5EncoderModel(byt5))).parameters(np.dtype(np.float32)), T5_RULES, mesh)
