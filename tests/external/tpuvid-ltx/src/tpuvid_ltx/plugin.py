"""LTX-Video 0.9.0, text to video. Imports neither jax nor torch."""

from tpuvid.contract import Conformance, GenerationConfig, ModelSpec, SizeRules, hookimpl

SMALL = dict(height=64, width=96, num_frames=17, num_inference_steps=3, guidance_scale=3.0, seed=7, max_sequence_length=40)

LTX_VIDEO = ModelSpec(
    model_id="ltx-video-0.9",
    family="ltx",
    api_version=3,
    pipeline_class="LTXPipeline",
    checkpoint="Lightricks/LTX-Video",
    parameters="1.9B",
    signature={"num_layers": 28, "num_attention_heads": 32, "attention_head_dim": 64, "in_channels": 128},
    # the example of diffusers' `LTXPipeline`, and the defaults of its call
    defaults=GenerationConfig(
        height=480, width=704, num_frames=161, fps=25, num_inference_steps=50, guidance_scale=3.0, max_sequence_length=128
    ),
    # 8× time and 32× space in the VAE. Rotary positions are computed, so the limits are only those of good sense.
    rules=SizeRules(frame_step=8, size_multiple=32, max_frames=8 * 255 + 1, max_size=32 * 128),
    takes=("cache", "window_size", "fps"),
    components={"encode": ("tokenizer", "text_encoder"), "denoise": ("transformer", "scheduler"), "decode": ("vae",)},
    load_text_encoder="tpuvid_ltx.encode:LTXTextEncoder",
    load_denoiser="tpuvid_ltx.denoise:LTXDenoiser",
    load_decoder="tpuvid_ltx.decode:LTXDecoder",
    conformance=Conformance(
        random_checkpoint="tpuvid_ltx.conformance:random_checkpoint",
        settings=SMALL,
        reference="tpuvid_ltx.conformance:reference",
    ),
)


@hookimpl
def tpuvid_models():
    return [LTX_VIDEO]
