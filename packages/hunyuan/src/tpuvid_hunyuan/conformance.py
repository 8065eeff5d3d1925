"""What HunyuanVideo 1.5 is checked with: small random checkpoints in the ordinary diffusers layout, and the stock pipeline."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from tokenizers import pre_tokenizers
from tpuvid.contract import GenerationConfig
from tpuvid.testing import spread
from transformers import ByT5Tokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, Qwen2Tokenizer, T5Config, T5EncoderModel

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# Qwen's template, with as much of the system message as fills the 108 tokens that are cut off, here one for each byte:
# the prompt's own tokens come right after, as they do with the published tokenizer.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'][:92] if message['role'] == 'system' else message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class RandomHunyuan:
    heads: int = 2
    rope_dims: tuple[int, int, int] = (4, 6, 6)
    """Their sum is the width of a head."""
    layers: int = 2
    refiner_layers: int = 2
    text_dim: int = 32
    text_layers: int = 4
    glyph_dim: int = 24
    channels: int = 4
    vae_widths: tuple[int, ...] = (8, 8, 8, 16, 16)
    vae_layers: int = 1
    scaling_factor: float = 1.3
    shift: float = 5.0
    guider: dict = field(default_factory=dict)
    seed: int = 0

    def save(self, folder: Path) -> Path:
        torch.manual_seed(self.seed)
        tokenizer = _tokenizer()
        text_encoder = Qwen2_5_VLTextModel(
            Qwen2_5_VLTextConfig(
                vocab_size=len(tokenizer) + -len(tokenizer) % 8, hidden_size=self.text_dim, intermediate_size=48,
                num_hidden_layers=self.text_layers, num_attention_heads=4, num_key_value_heads=2, bos_token_id=0,
                eos_token_id=0,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": _sections(self.text_dim // 8)},
            )
        )  # fmt: skip
        text_encoder_2 = T5EncoderModel(
            T5Config(
                vocab_size=384, d_model=self.glyph_dim, d_kv=8, d_ff=40, num_layers=2, num_heads=2,
                feed_forward_proj="gated-gelu", relative_attention_num_buckets=8, relative_attention_max_distance=20,
                pad_token_id=0, eos_token_id=1,
            )
        )  # fmt: skip
        transformer = HunyuanVideo15Transformer3DModel(
            in_channels=2 * self.channels + 1, out_channels=self.channels, num_attention_heads=self.heads,
            attention_head_dim=sum(self.rope_dims), num_layers=self.layers, num_refiner_layers=self.refiner_layers,
            text_embed_dim=self.text_dim, text_embed_2_dim=self.glyph_dim, image_embed_dim=20, rope_axes_dim=self.rope_dims,
            task_type="t2v",
        )  # fmt: skip
        vae = AutoencoderKLHunyuanVideo15(
            latent_channels=self.channels, block_out_channels=self.vae_widths, layers_per_block=self.vae_layers,
            scaling_factor=self.scaling_factor,
        )  # fmt: skip
        for module in (text_encoder, text_encoder_2, transformer, vae):
            spread(module, wider=1.5)
        HunyuanVideo15Pipeline(
            text_encoder=text_encoder, tokenizer=tokenizer, text_encoder_2=text_encoder_2, tokenizer_2=ByT5Tokenizer(),
            transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=self.shift),
            guider=ClassifierFreeGuidance(**{"guidance_scale": 6.0} | self.guider),
        ).save_pretrained(folder)  # fmt: skip
        return folder


def random_checkpoint(folder: Path) -> None:
    RandomHunyuan(heads=4).save(folder)


def reference(folder: Path, config: GenerationConfig) -> dict[str, np.ndarray]:
    """`HunyuanVideo15Pipeline` of diffusers."""
    pipe = stock_pipeline(folder, config)
    found = {name: run_stock(pipe, config, kind) for name, kind in (("latents", "latent"), ("frames", "np"))}
    return found | {f"prompt_{name}": tensor.numpy() for name, tensor in stock_streams(pipe, config.prompt).items()}


def stock_pipeline(folder: Path, config: GenerationConfig) -> HunyuanVideo15Pipeline:
    """The stock pipeline in float32, with the config's length of prompts and shift, if it gives one."""
    pipe = HunyuanVideo15Pipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.tokenizer_max_length = config.max_sequence_length
    if config.flow_shift is not None:
        pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, shift=config.flow_shift)
    return pipe


def stock_streams(pipe: HunyuanVideo15Pipeline, prompt: str) -> dict[str, torch.Tensor]:
    """The embeddings and masks that both text encoders make of one prompt."""
    with torch.no_grad():
        return dict(zip(("embeds", "embeds_mask", "embeds_2", "embeds_mask_2"), pipe.encode_prompt(prompt), strict=True))


def run_stock(pipe: HunyuanVideo15Pipeline, config: GenerationConfig, output_type: str) -> np.ndarray:
    """Latents ("latent") or frames ("np")."""
    # made anew: the stock pipeline asks a guider whether it guides while that still stands at the last run's last step
    own = {} if config.guidance_scale is None else {"guidance_scale": config.guidance_scale}
    pipe.guider = pipe.guider.new(**own)
    frames = pipe(
        config.prompt, config.negative_prompt, height=config.height, width=config.width, num_frames=config.num_frames,
        num_inference_steps=config.num_inference_steps, generator=torch.Generator().manual_seed(config.seed),
        output_type=output_type,
    ).frames  # fmt: skip
    return np.asarray(frames)


def _sections(half: int) -> list[int]:
    """Half a head's width in three parts, as the published 16 + 24 + 24 of 64."""
    return [half // 4, half * 3 // 8, half - half // 4 - half * 3 // 8]


def _tokenizer() -> Qwen2Tokenizer:
    """Qwen's, with no merges: every byte is a token."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], padding_side="right", chat_template=TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer
