"""What CogVideoX is checked with: small random checkpoints in the ordinary diffusers layout, and the stock pipeline."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from tpuvid.contract import GenerationConfig
from tpuvid.testing import spread
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel


@dataclass(frozen=True)
class RandomCogVideoX:
    heads: int = 2
    head_dim: int = 16
    layers: int = 2
    text_dim: int = 24
    channels: int = 4
    patch_size_t: int | None = 2
    """None: CogVideoX 1.0."""
    sample_size: int = 20
    vae_widths: tuple[int, ...] = (4, 8, 8, 8)
    groups: int = 4
    vae_size: tuple[int, int] = (480, 720)
    """Height and width that the VAE is made for: its tiles are half as large."""
    scaling_factor: float = 0.7
    dpm: bool = False
    snr_shift_scale: float = 1.0
    seed: int = 0

    def save(self, folder: Path) -> Path:
        torch.manual_seed(self.seed)
        text_encoder = T5EncoderModel(
            T5Config(
                vocab_size=384, d_model=self.text_dim, d_kv=8, d_ff=40, num_layers=2, num_heads=3,
                feed_forward_proj="gated-gelu", relative_attention_num_buckets=8, relative_attention_max_distance=20,
                pad_token_id=0, eos_token_id=1,
            )
        )  # fmt: skip
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=self.heads, attention_head_dim=self.head_dim, in_channels=self.channels,
            out_channels=self.channels, time_embed_dim=24, text_embed_dim=self.text_dim, num_layers=self.layers,
            sample_width=self.sample_size, sample_height=self.sample_size, patch_size_t=self.patch_size_t,
            patch_bias=self.patch_size_t is None, use_rotary_positional_embeddings=True,
        )  # fmt: skip
        vae = AutoencoderKLCogVideoX(
            block_out_channels=self.vae_widths, latent_channels=self.channels, layers_per_block=1, norm_num_groups=self.groups,
            scaling_factor=self.scaling_factor, sample_height=self.vae_size[0], sample_width=self.vae_size[1],
        )  # fmt: skip
        for module in (text_encoder, transformer, vae):
            spread(module)
        # scheduler_config.json of the published CogVideoX checkpoints
        scheduler = (CogVideoXDPMScheduler if self.dpm else CogVideoXDDIMScheduler)(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=self.snr_shift_scale,
            timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False,
        )  # fmt: skip
        CogVideoXPipeline(ByT5Tokenizer(), text_encoder, vae, transformer, scheduler).save_pretrained(folder)
        return folder


def random_checkpoint(folder: Path) -> None:
    RandomCogVideoX(heads=4).save(folder)


def reference(folder: Path, config: GenerationConfig) -> dict[str, np.ndarray]:
    """`CogVideoXPipeline` of diffusers."""
    pipe = stock_pipeline(folder)
    length = config.max_sequence_length
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt(config.prompt, do_classifier_free_guidance=False, max_sequence_length=length)
    found = {name: run_stock(pipe, config, kind) for name, kind in (("latents", "latent"), ("frames", "np"))}
    return found | {"prompt_embeds": embeds.numpy()}


def stock_pipeline(folder: Path) -> CogVideoXPipeline:
    """The stock pipeline in float32."""
    pipe = CogVideoXPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_stock(pipe: CogVideoXPipeline, config: GenerationConfig, output_type: str) -> np.ndarray:
    """Latents ("latent", [B, C, f, h, w] without the additional frames) or frames ("np")."""
    frames = pipe(
        config.prompt, config.negative_prompt, height=config.height, width=config.width, num_frames=config.num_frames,
        num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale,
        use_dynamic_cfg=config.use_dynamic_cfg, max_sequence_length=config.max_sequence_length,
        generator=torch.Generator().manual_seed(config.seed), output_type=output_type,
    ).frames  # fmt: skip
    if output_type != "latent":
        return np.asarray(frames)
    real = (config.num_frames - 1) // 4 + 1
    return frames[:, frames.shape[1] - real :].permute(0, 2, 1, 3, 4).numpy()
