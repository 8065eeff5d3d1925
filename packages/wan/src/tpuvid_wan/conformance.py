"""What Wan is checked with: small random checkpoints in the ordinary diffusers layout, and the stock pipeline."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tpuvid.contract import GenerationConfig
from tpuvid.testing import spread
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel


@dataclass(frozen=True)
class RandomWan:
    heads: int = 2
    head_dim: int = 16
    layers: int = 2
    cross_attn_norm: bool = True
    text_dim: int = 24
    channels: int = 4
    vae_dim: int = 6
    dim_mult: tuple[int, ...] = (1, 2, 2, 2)
    flow_shift: float = 3.0
    euler: bool = False
    seed: int = 0

    def save(self, folder: Path) -> Path:
        torch.manual_seed(self.seed)
        text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=384, d_model=self.text_dim, d_kv=8, d_ff=40, num_layers=2, num_heads=3,
                relative_attention_num_buckets=8, relative_attention_max_distance=20, pad_token_id=0, eos_token_id=1,
            )
        )  # fmt: skip
        transformer = WanTransformer3DModel(
            num_attention_heads=self.heads, attention_head_dim=self.head_dim, in_channels=self.channels,
            out_channels=self.channels, text_dim=self.text_dim, freq_dim=32, ffn_dim=56, num_layers=self.layers,
            cross_attn_norm=self.cross_attn_norm, rope_max_seq_len=64,
        )  # fmt: skip
        vae = AutoencoderKLWan(
            base_dim=self.vae_dim, z_dim=self.channels, dim_mult=list(self.dim_mult), num_res_blocks=1,
            temperal_downsample=[False, True, True], latents_mean=[0.1 * i - 0.2 for i in range(self.channels)],
            latents_std=[1.0 + 0.3 * i for i in range(self.channels)],
        )  # fmt: skip
        for module in (text_encoder, transformer, vae):
            spread(module)
        if self.euler:
            scheduler = FlowMatchEulerDiscreteScheduler(shift=self.flow_shift)
        else:
            scheduler = UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=self.flow_shift
            )
        WanPipeline(ByT5Tokenizer(), text_encoder, vae, scheduler, transformer).save_pretrained(folder)
        return folder


def random_checkpoint(folder: Path) -> None:
    RandomWan(heads=4).save(folder)


def reference(folder: Path, config: GenerationConfig) -> dict[str, np.ndarray]:
    """`WanPipeline` of diffusers."""
    pipe = stock_pipeline(folder, config)
    length = config.max_sequence_length
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt(config.prompt, do_classifier_free_guidance=False, max_sequence_length=length)
    found = {name: run_stock(pipe, config, kind) for name, kind in (("latents", "latent"), ("frames", "np"))}
    return found | {"prompt_embeds": embeds.numpy()}


def stock_pipeline(folder: Path, config: GenerationConfig) -> WanPipeline:
    """The stock pipeline in float32, with the config's shift, if it gives one."""
    pipe = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if config.flow_shift is not None:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=config.flow_shift)
    return pipe


def run_stock(pipe: WanPipeline, config: GenerationConfig, output_type: str) -> np.ndarray:
    """Latents ("latent") or frames ("np")."""
    frames = pipe(
        config.prompt, config.negative_prompt, height=config.height, width=config.width, num_frames=config.num_frames,
        num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale,
        max_sequence_length=config.max_sequence_length, generator=torch.Generator().manual_seed(config.seed),
        output_type=output_type,
    ).frames  # fmt: skip
    return np.asarray(frames)
