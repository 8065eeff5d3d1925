"""The Wan 2.1 text-to-video models. Imports neither jax nor torch."""

from pathlib import Path
from typing import Any

from tpuvid.contract import Conformance, GenerationConfig, ModelSpec, SizeRules, hookimpl

# 4n+1 frames and multiples of 16 pixels: 4× time and 8× space in the VAE, 2×2 patches in the transformer, whose rotary
# table has 1024 positions along each axis (rope_max_seq_len).
RULES = SizeRules(frame_step=4, size_multiple=16, max_frames=4 * 1023 + 1, max_size=1024 * 16)

# Model cards of the Diffusers checkpoints: shift 5.0 at 720p, 3.0 at 480p. The limits lie between the published sizes;
# smaller videos keep the checkpoint's own shift.
FLOW_SHIFTS = ((600_000, 5.0), (300_000, 3.0))

COMMON: dict[str, Any] = dict(
    family="wan",
    api_version=3,
    pipeline_class="WanPipeline",
    rules=RULES,
    takes=("flow_shift", "cache", "window_size", "lora"),
    components={"encode": ("tokenizer", "text_encoder"), "denoise": ("transformer", "scheduler"), "decode": ("vae",)},
    conformance=Conformance(
        random_checkpoint="tpuvid_wan.conformance:random_checkpoint",
        reference="tpuvid_wan.conformance:reference",
        settings=dict(
            height=32, width=48, num_frames=9, num_inference_steps=3, guidance_scale=3.0, seed=7, max_sequence_length=40
        ),
    ),
    load_text_encoder="tpuvid_wan.encode:WanTextEncoder",
    load_denoiser="tpuvid_wan.denoise:WanDenoiser",
    load_decoder="tpuvid_wan.decode:WanDecoder",
)
SAMPLING: dict[str, Any] = dict(num_frames=81, fps=16, num_inference_steps=50, guidance_scale=5.0)

PREVIEW = "tpuvid_wan:configs/preview-wan2.1.json"
"""The map of latents as the VAE decodes them, by ComfyUI's factors for normalised ones (comfy/latent_formats.py at 040a324)."""

WAN_14B = ModelSpec(
    model_id="wan2.1-t2v-14b",
    checkpoint="Wan-AI/Wan2.1-T2V-14B-Diffusers",
    configs="tpuvid_wan:configs/wan2.1-t2v-14b",
    preview=PREVIEW,
    parameters="14.3B",
    signature={"num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 16},
    defaults=GenerationConfig(height=720, width=1280, **SAMPLING),
    flow_shifts=FLOW_SHIFTS,
    **COMMON,
)
WAN_1_3B = ModelSpec(
    model_id="wan2.1-t2v-1.3b",
    checkpoint="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    configs="tpuvid_wan:configs/wan2.1-t2v-1.3b",
    preview=PREVIEW,
    parameters="1.4B",
    signature={"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16},
    defaults=GenerationConfig(height=480, width=832, **SAMPLING),
    flow_shifts=FLOW_SHIFTS,
    **COMMON,
)


@hookimpl
def tpuvid_block_sizes() -> list[Path]:
    return [Path(__file__).with_name("block_sizes.json")]


@hookimpl
def tpuvid_models() -> list[ModelSpec]:
    return [WAN_14B, WAN_1_3B]
