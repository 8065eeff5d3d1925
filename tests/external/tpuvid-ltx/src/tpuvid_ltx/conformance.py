"""What `tpuvid plugin check` runs LTX-Video with: a small random checkpoint, and stock `LTXPipeline` of diffusers."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from tpuvid.contract import GenerationConfig
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel


def random_checkpoint(folder: Path) -> None:
    torch.manual_seed(0)
    t5 = T5Config(vocab_size=384, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    text_encoder = T5EncoderModel(t5)
    transformer = LTXVideoTransformer3DModel(
        8, 8, num_attention_heads=4, attention_head_dim=14, cross_attention_dim=56, num_layers=3, caption_channels=24
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 12, 12), decoder_block_out_channels=(8, 8, 12, 12), scaling_factor=0.7,
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 2, 1, 1, 1),
    )  # fmt: skip
    vae.latents_mean, vae.latents_std = torch.randn(8), torch.rand(8) + 0.5
    for parameter in (p for module in (text_encoder, transformer, vae) for p in module.parameters()):
        if parameter.ndim == 1 or parameter.std() < 0.02:  # zeros, ones or nearly nothing would hide bugs
            parameter.data += 0.1 * torch.randn_like(parameter)
    published = dict(base_image_seq_len=1024, base_shift=0.95, max_shift=2.05, shift_terminal=0.1)  # by Lightricks
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **published)
    LTXPipeline(scheduler, vae, text_encoder, ByT5Tokenizer(), transformer).save_pretrained(folder)


@torch.no_grad()
def reference(folder: Path, config: GenerationConfig) -> dict[str, np.ndarray]:
    pipe = LTXPipeline.from_pretrained(folder)  # whose weights are float32
    length = dict(max_sequence_length=config.max_sequence_length)
    embeds, mask, *_ = pipe.encode_prompt(config.prompt, do_classifier_free_guidance=False, **length)
    names = ("prompt", "negative_prompt", "height", "width", "num_frames", "num_inference_steps", "guidance_scale")
    settings = {name: getattr(config, name) for name in names} | {"frame_rate": config.fps} | length
    packed, frames = (
        pipe(**settings, generator=torch.Generator().manual_seed(config.seed), output_type=output_type).frames
        for output_type in ("latent", "np")
    )
    grid = (config.num_frames - 1) // 8 + 1, config.height // 32, config.width // 32
    found = {"prompt_embeds": embeds, "prompt_attention_mask": mask, "latents": pipe._unpack_latents(packed, *grid)}
    return {name: tensor.numpy() for name, tensor in found.items()} | {"frames": frames}
