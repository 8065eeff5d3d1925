"""wan-tiny: a trained Wan 2.1 checkpoint small enough to ship in this package, and a faster decoder for it. Imports neither jax
nor torch."""

import dataclasses

from tpuvid.contract import DecoderSpec, GenerationConfig, ModelSpec, hookimpl
from tpuvid_wan.plugin import WAN_1_3B

WAN_TINY = dataclasses.replace(
    WAN_1_3B,
    model_id="wan-tiny",
    checkpoint="tpuvid_tiny:checkpoint",
    preview="tpuvid_tiny:preview.json",
    parameters="3.9M",
    conformance=None,
    signature={"num_layers": 6, "num_attention_heads": 6, "attention_head_dim": 32, "in_channels": 16},
    defaults=GenerationConfig(height=64, width=64, num_frames=17, fps=8, num_inference_steps=24, guidance_scale=4.0),
)

PREVIEW = DecoderSpec(
    name="preview",
    models=(WAN_TINY.model_id,),
    checkpoint="tpuvid_tiny:decoders",
    component="preview",
    load_decoder="tpuvid_tiny.decode:PreviewDecoder",
    api_version=3,
)


@hookimpl
def tpuvid_models() -> list[ModelSpec]:
    return [WAN_TINY]


@hookimpl
def tpuvid_decoders() -> list[DecoderSpec]:
    return [PREVIEW]
