"""The denoising step of Wan 2.1 at full size, compiled for real TPUs by libtpu."""

import pytest
from shared.aot import compile_steps

pytestmark = pytest.mark.aot

CONFIGS = {
    "wan2.1-t2v-14b": dict(num_layers=40, num_attention_heads=40, ffn_dim=13824),
    "wan2.1-t2v-1.3b": dict(num_layers=30, num_attention_heads=12, ffn_dim=8960),
}


@pytest.mark.parametrize(
    "model, chips, cache", [("wan2.1-t2v-14b", 8, None), ("wan2.1-t2v-14b", 8, "deepcache"), ("wan2.1-t2v-1.3b", 1, None)]
)
def test_step_compiles_and_fits(tmp_path, model, chips, cache):
    scheduler = dict(_class_name="UniPCMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True)
    transformer = CONFIGS[model] | {"attention_head_dim": 128, "text_dim": 4096}
    found = compile_steps(
        tmp_path,
        model,
        {"transformer": transformer, "scheduler": scheduler},
        {"prompt_embeds": (1, 512, 4096)},
        chips=chips,
        cache=cache,
    )
    print(found)
    full, cached = found["full"], found["cached"]
    assert found["mesh"] == {8: {"dp": 2, "tp": 4}, 1: {"dp": 1, "tp": 1}}[chips]
    assert full["gib"] < 31.25, "a v6e chip has 32 GB"
    assert full["kernels"] >= 2, "self- and cross-attention run on the Pallas kernel"
    assert full["gathers"] == 0, "no activation is gathered whole"
    if cache:
        assert cached["gib"] < 31.25 and cached["kernels"] == 2 and cached["loops"] < full["loops"], "one block alone"
