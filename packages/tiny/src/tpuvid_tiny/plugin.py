"""wan-tiny: a trained Wan 2.1 checkpoint small enough to ship in this package. Imports neither jax nor torch."""

import dataclasses

from tpuvid.hookspecs import hookimpl
from tpuvid.stages import GenerationConfig
from tpuvid_wan.plugin import WAN_1_3B

WAN_TINY = dataclasses.replace(
    WAN_1_3B,
    model_id="wan-tiny",
    checkpoint="tpuvid_tiny:checkpoint",
    parameters="3.9M",
    conformance=None,
    signature={"num_layers": 6, "num_attention_heads": 6, "attention_head_dim": 32, "in_channels": 16},
    defaults=GenerationConfig(height=64, width=64, num_frames=17, fps=8, num_inference_steps=24, guidance_scale=4.0),
)


@hookimpl
def tpuvid_models():
    return [WAN_TINY]
