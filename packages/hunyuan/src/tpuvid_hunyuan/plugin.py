"""The HunyuanVideo 1.5 text-to-video models. Imports neither jax nor torch."""

from pathlib import Path
from typing import Any

from tpuvid.contract import Conformance, GenerationConfig, ModelSpec, SizeRules, hookimpl

# 4n+1 frames and multiples of 16 pixels: 4× time and 16× space in the VAE, patches of one latent. Rotary positions are
# computed, not looked up, so the limits are only those of good sense.
RULES = SizeRules(frame_step=4, size_multiple=16, max_frames=4 * 1023 + 1, max_size=1024 * 16)

COMMON: dict[str, Any] = dict(
    family="hunyuan",
    api_version=3,
    pipeline_class="HunyuanVideo15Pipeline",
    parameters="8.3B",
    rules=RULES,
    takes=("flow_shift", "cache", "window_size"),
    components={
        "encode": ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"),
        "denoise": ("transformer", "scheduler", "guider"),
        "decode": ("vae",),
    },
    conformance=Conformance(
        random_checkpoint="tpuvid_hunyuan.conformance:random_checkpoint",
        reference="tpuvid_hunyuan.conformance:reference",
        settings=dict(
            height=32, width=48, num_frames=9, num_inference_steps=3, guidance_scale=3.0, seed=7, max_sequence_length=60
        ),
    ),
    load_text_encoder="tpuvid_hunyuan.encode:HunyuanTextEncoder",
    load_denoiser="tpuvid_hunyuan.denoise:HunyuanDenoiser",
    load_decoder="tpuvid_hunyuan.decode:HunyuanDecoder",
)
# guidance_scale: the guider's in the checkpoint, 6.0 as published
SAMPLING: dict[str, Any] = dict(num_frames=121, fps=24, num_inference_steps=50, guidance_scale=None, max_sequence_length=1000)

# Sizes: what `HunyuanVideo15Pipeline` takes for a 16:9 video at the transformer's target_size.
HUNYUAN_720P = ModelSpec(
    model_id="hunyuanvideo-1.5-t2v-720p",
    checkpoint="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v",
    configs="tpuvid_hunyuan:configs/hunyuanvideo-1.5-t2v-720p",
    signature={"num_layers": 54, "target_size": 960},
    defaults=GenerationConfig(height=720, width=1280, **SAMPLING),
    **COMMON,
)
HUNYUAN_480P = ModelSpec(
    model_id="hunyuanvideo-1.5-t2v-480p",
    checkpoint="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
    configs="tpuvid_hunyuan:configs/hunyuanvideo-1.5-t2v-480p",
    signature={"num_layers": 54, "target_size": 640},
    defaults=GenerationConfig(height=480, width=848, **SAMPLING),
    **COMMON,
)


@hookimpl
def tpuvid_block_sizes() -> list[Path]:
    return [Path(__file__).with_name("block_sizes.json")]


@hookimpl
def tpuvid_models() -> list[ModelSpec]:
    return [HUNYUAN_720P, HUNYUAN_480P]
