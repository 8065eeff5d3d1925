"""Small random CogVideoX checkpoints in the ordinary diffusers layout, for tests."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from shared.spread import spread
from shared.words import WORDS, t5_tokenizer
from transformers import T5Config, T5EncoderModel


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
                vocab_size=len(WORDS), d_model=self.text_dim, d_kv=8, d_ff=40, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu",
                relative_attention_num_buckets=8, relative_attention_max_distance=20, pad_token_id=0, eos_token_id=1,
            )
        )  # fmt: skip
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=self.heads, attention_head_dim=self.head_dim, in_channels=self.channels, out_channels=self.channels,
            time_embed_dim=24, text_embed_dim=self.text_dim, num_layers=self.layers, sample_width=self.sample_size,
            sample_height=self.sample_size, patch_size_t=self.patch_size_t, patch_bias=self.patch_size_t is None,
            use_rotary_positional_embeddings=True,
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
        CogVideoXPipeline(t5_tokenizer(), text_encoder, vae, transformer, scheduler).save_pretrained(folder)
        return folder
