"""Generate clips in batches with the training code's fast forward passes, to judge a model while it trains.

`evaluate.py` judges the finished folder through the public pipelines instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import fastdit
import numpy as np
import onepass
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from text import tokens_of
from torch import Tensor
from tpuvid_tiny.grammar import SHAPES, Scene, held_out_scenes
from tpuvid_tiny.score import read_clip
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

TEXT_LENGTH = 512  # WanPipeline's default max_sequence_length
LATENT_GRID = (5, 8, 8)  # frames, height, width of a 17 x 64 x 64 clip


@dataclass(frozen=True)
class Sampler:
    """The settings a user of the pipeline would choose."""

    steps: int = 24
    guidance: float = 4.0
    flow_shift: float = 3.0


@dataclass(frozen=True)
class TextToVideo:
    """The parts of one model; the VAE's configuration holds the latents' statistics."""

    tokenizer: PreTrainedTokenizerFast
    text_encoder: UMT5EncoderModel
    transformer: WanTransformer3DModel
    vae: AutoencoderKLWan


def make_scheduler(flow_shift: float) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)


def latent_scale(config: dict, device: str) -> tuple[Tensor, Tensor]:
    """The latents' mean and standard deviation, shaped to broadcast over [B, z, f, h, w]."""
    names = ("latents_mean", "latents_std")
    return tuple(torch.tensor(config[name], device=device).view(1, -1, 1, 1, 1) for name in names)


@torch.no_grad()
def generate(model: TextToVideo, captions: list[str], sampler: Sampler, seed: int) -> np.ndarray:
    """One clip per caption, float32 [B, F, H, W, 3] in [0, 1]."""
    device = str(model.transformer.proj_out.weight.device)
    ids, mask = (rows.to(device) for rows in tokens_of([*captions, *[""] * len(captions)], model.tokenizer))
    words = model.text_encoder(ids, mask).last_hidden_state
    text, bias = fastdit.with_padding(words, mask, torch.full((len(ids),), TEXT_LENGTH, device=device))
    scheduler = make_scheduler(sampler.flow_shift)
    scheduler.set_timesteps(sampler.steps, device=device)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(len(captions), 16, *LATENT_GRID, generator=generator).to(device)
    for t in scheduler.timesteps:
        velocity = fastdit.forward(model.transformer, torch.cat([z, z]), t.expand(len(ids)), text, bias, torch.bfloat16)
        with_prompt, without = velocity.chunk(2)
        z = scheduler.step(without + sampler.guidance * (with_prompt - without), t, z, return_dict=False)[0]
    mean, std = latent_scale(model.vae.config, device)
    clips = onepass.decode(model.vae, z * std + mean, torch.bfloat16)
    return (clips / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).cpu().numpy()


def sample_of_held_out(count: int) -> list[Scene]:
    """``count`` held-out scenes, as many of each shape, spread over the rest."""
    scenes = held_out_scenes()
    by_shape = [[scene for scene in scenes if scene.shape == shape] for shape in SHAPES]
    each = count // len(SHAPES)
    return [group[i * len(group) // each] for group in by_shape for i in range(each)]


def accuracy(model: TextToVideo, scenes: list[Scene], sampler: Sampler, seed: int = 0, batch: int = 12) -> dict[str, float]:
    """The share of generated clips that show each attribute of their caption; ``all`` is colour, shape and motion."""
    verdicts = []
    for start in range(0, len(scenes), batch):
        group = scenes[start : start + batch]
        clips = generate(model, [scene.caption() for scene in group], sampler, seed + start)
        verdicts += [read_clip(clip).compare(scene) for clip, scene in zip(clips, group, strict=True)]
    return {name: float(np.mean([verdict[name] for verdict in verdicts])) for name in verdicts[0]}
