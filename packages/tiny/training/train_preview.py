"""Teach the preview decoder to draw what the VAE's decoder draws, and write its weights.

    python train_preview.py --out ../src/tpuvid_tiny/decoders/preview

One core of a CPU is enough, and the only one used: the same seed gives the same weights on the same machine.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import onepass
import torch
import tpuvid_tiny
from diffusers import AutoencoderKLWan
from muon import Average, Optimisers
from safetensors.torch import save_file
from torch import Tensor
from tpuvid_tiny.decode import PreviewNetwork
from tpuvid_tiny.grammar import all_scenes, training_scenes
from train_vae import learning_rate, render_clips, to_network

VAE = Path(tpuvid_tiny.__file__).parent / "checkpoint" / "vae"
WIDTHS = (52, 32, 32)
NOISE = 0.1
"""The share of a latent channel's deviation that is added as noise to half of the clips' latents before the VAE draws them:
what a diffusion model makes is not quite what the VAE's encoder makes."""


@torch.no_grad()
def draw(vae: AutoencoderKLWan, clips: np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
    """Latents [K, C, f, h, w] of clips (the mode), and what the VAE makes of them: bfloat16 [K, 3, F, H, W] in [−1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    latents, pixels = [], []
    for i in range(0, len(clips), 4):
        z = onepass.encode(vae, to_network(clips[i : i + 4]).bfloat16())[0]
        noise = NOISE * std * torch.randn(z.shape, generator=generator)
        noise[::2] = 0
        latents.append(z + noise)
        pixels.append(onepass.decode(vae, latents[-1], torch.bfloat16).clamp(-1, 1).bfloat16())
    return torch.cat(latents), torch.cat(pixels)


def forward(network: PreviewNetwork, z: Tensor) -> Tensor:
    """Latents [B, C, f, h, w] → pixels [B, 3, F, H, W]."""
    first = network.first_frame(z[:, :, 0])
    before, now = z[:, :, :-1], z[:, :, 1:]
    inputs = (part.transpose(1, 2).flatten(0, 1) for part in (z[:, :, :1].expand_as(now), before, now))
    further = network.further_frames(*inputs).unflatten(0, (len(z), -1))  # [B, n, 3, 4, H, W]
    return torch.cat([first, further.transpose(1, 2).flatten(2, 3)], dim=2)


@torch.no_grad()
def psnr(network: PreviewNetwork, latents: Tensor, pixels: Tensor) -> tuple[float, float]:
    """Mean and worst PSNR in dB, on the [0, 1] scale, over clips."""
    square = (forward(network, latents).clamp(-1, 1) - pixels.float()).square().mean(dim=(1, 2, 3, 4)) / 4
    each = -10 * torch.log10(square)
    return float(each.mean()), float(each.min())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder for config.json and weights")
    parser.add_argument("--clips", type=int, default=400)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=8, help="clips per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    began = time.monotonic()
    vae = AutoencoderKLWan.from_pretrained(VAE, torch_dtype=torch.float32).eval()
    latents, pixels = draw(vae, render_clips(training_scenes(), args.clips, seed=args.seed + 1), args.seed)
    unseen = render_clips([scene for scene in all_scenes() if scene.held_out], 32, seed=args.seed + 2)
    held_out = draw(vae, unseen, args.seed + 1)
    print(f"{time.monotonic() - began:.0f} s: {args.clips} clips drawn", flush=True)

    config = {"latent_channels": latents.shape[1], "widths": WIDTHS}
    config |= {name: getattr(vae.config, name) for name in ("latents_mean", "latents_std")}
    network = PreviewNetwork(config).to(memory_format=torch.channels_last)
    optimisers = Optimisers(list(network.named_parameters()), args.lr, adam_words=("first", "further", "out"))
    average = Average(network, decay=0.99)
    squares = []
    for step in range(args.steps):
        picked = torch.from_numpy(rng.integers(len(latents), size=args.batch))
        with torch.autocast("cpu", torch.bfloat16):
            drawn = forward(network, latents[picked])
        error = drawn.float() - pixels[picked].float()
        square = error.square().mean()
        (error.abs().mean() + 2 * square).backward()
        optimisers.step(learning_rate((step + 1) / args.steps))
        average.update(network)
        squares.append(float(square.detach()) / 4)
        if (step + 1) % 100 == 0:
            train = -10 * np.log10(np.mean(squares[-100:]))
            print(f"{time.monotonic() - began:.0f} s  step {step + 1}  train {train:.2f} dB", flush=True)
    network.load_state_dict(average.weights)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    weights = {name: weight.contiguous() for name, weight in network.state_dict().items()}
    save_file(weights, args.out / "diffusion_pytorch_model.safetensors")
    (args.out / "diffusion_pytorch_model.safetensors").chmod(0o644)
    print(f"{sum(weight.numel() for weight in weights.values())} parameters; {time.monotonic() - began:.0f} s")
    mean, worst = psnr(network, *held_out)
    print(f"held-out clips, against the VAE's decoder: mean {mean:.2f} dB, worst {worst:.2f} dB")


if __name__ == "__main__":
    main()
