"""The CogVideoX text-to-video models. Imports neither jax nor torch."""

from pathlib import Path

from tpuvid.contract import Conformance, GenerationConfig, ModelSpec, SizeRules, hookimpl

# 4n+1 frames and multiples of 16 pixels: 4× time and 8× space in the VAE, 2×2 patches in the transformer, whose rotary
# table has 150 positions along each axis (sample_height and sample_width of 300 latents). 161 frames: the model card's most.
RULES = SizeRules(frame_step=4, size_multiple=16, max_frames=161, max_size=150 * 16)

COGVIDEOX_1_5_5B = ModelSpec(
    model_id="cogvideox1.5-5b",
    family="cogvideox",
    api_version=3,
    pipeline_class="CogVideoXPipeline",
    checkpoint="zai-org/CogVideoX1.5-5B",
    configs="tpuvid_cogvideox:configs/cogvideox1.5-5b",
    parameters="5.6B",
    signature={"num_layers": 42, "num_attention_heads": 48, "attention_head_dim": 64, "patch_size_t": 2},
    defaults=GenerationConfig(
        height=768, width=1360, num_frames=81, fps=16, num_inference_steps=50, guidance_scale=6.0, max_sequence_length=226
    ),
    rules=RULES,
    takes=("use_dynamic_cfg", "cache", "window_size"),
    components={"encode": ("tokenizer", "text_encoder"), "denoise": ("transformer", "scheduler"), "decode": ("vae",)},
    conformance=Conformance(
        random_checkpoint="tpuvid_cogvideox.conformance:random_checkpoint",
        reference="tpuvid_cogvideox.conformance:reference",
        settings=dict(
            height=32, width=48, num_frames=9, num_inference_steps=3, guidance_scale=3.0, seed=7, max_sequence_length=40
        ),
    ),
    load_text_encoder="tpuvid_cogvideox.encode:CogVideoXTextEncoder",
    load_denoiser="tpuvid_cogvideox.denoise:CogVideoXDenoiser",
    load_decoder="tpuvid_cogvideox.decode:CogVideoXDecoder",
)


@hookimpl
def tpuvid_block_sizes() -> list[Path]:
    return [Path(__file__).with_name("block_sizes.json")]


@hookimpl
def tpuvid_models() -> list[ModelSpec]:
    return [COGVIDEOX_1_5_5B]
