"""Train the VAE on small crops, then on longer ones, then on whole clips.

    python train_vae.py --out runs/vae.pt --minutes 30

Writes the averaged weights, the configuration and the latents' mean and standard deviation; again every few minutes.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onepass
import torch
from diffusers import AutoencoderKLWan
from muon import Average, Optimisers
from torch import Tensor
from tpuvid_tiny.grammar import all_scenes, training_scenes
from tpuvid_tiny.render import FRAMES, HEIGHT, render_uint8

CONFIG = {
    "base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
}


@dataclass(frozen=True)
class Phase:
    """Until ``until`` of the time is over, train on crops of this size; ``batch`` keeps the step's cost similar."""

    until: float
    size: int
    frames: int
    batch: int


PHASES = (Phase(0.15, 32, 5, 16), Phase(0.40, 32, 9, 16), Phase(1.0, HEIGHT, FRAMES, 4))


def render_clips(scenes: list, count: int, seed: int) -> np.ndarray:
    """``count`` clips of randomly drawn scenes, uint8 [count, F, H, W, 3]."""
    rng = np.random.default_rng(seed)
    return np.stack([render_uint8(scenes[i], rng) for i in rng.integers(len(scenes), size=count)])


def crops(clips: np.ndarray, phase: Phase, rng: np.random.Generator) -> Tensor:
    """Random crops [B, 3, F, H, W] in [-1, 1]."""
    room = HEIGHT - phase.size
    picked = []
    for index in rng.integers(len(clips), size=phase.batch):
        y, x = rng.integers(room + 1, size=2)
        t = rng.integers(FRAMES - phase.frames + 1)
        picked.append(clips[index, t : t + phase.frames, y : y + phase.size, x : x + phase.size])
    return to_network(np.stack(picked))


def to_network(clips: np.ndarray) -> Tensor:
    """uint8 [B, F, H, W, 3] to float32 [B, 3, F, H, W] in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def loss_of(vae: AutoencoderKLWan, x: Tensor, kl_weight: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The training loss, and the mean squared error on the [0, 1] scale for the log."""
    mean, logvar = onepass.encode(vae, x.to(dtype))
    z = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
    error = onepass.decode(vae, z, dtype) - x
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    square = error.square().mean()
    return error.abs().mean() + 2 * square + kl_weight * kl, square.detach() / 4


@torch.no_grad()
def psnr(vae: AutoencoderKLWan, clips: np.ndarray, device: str) -> tuple[float, float]:
    """Mean and worst PSNR in dB of reconstructing ``clips`` from the latents' mean."""
    each = []
    for clip in clips:
        x = to_network(clip[None]).to(device)
        y = onepass.decode(vae, onepass.encode(vae, x)[0]).clamp(-1, 1)
        each.append(float(-10 * torch.log10((x - y).square().mean() / 4)))
    return float(np.mean(each)), float(np.min(each))


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLWan, clips: np.ndarray, device: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per latent channel, as the configuration wants them."""
    batches = (to_network(clips[start : start + 8]).to(device, torch.bfloat16) for start in range(0, len(clips), 8))
    z = torch.cat([onepass.encode(vae, batch)[0] for batch in batches])
    return z.mean(dim=(0, 2, 3, 4)).tolist(), z.std(dim=(0, 2, 3, 4)).tolist()


def learning_rate(progress: float) -> float:
    """Scale of the learning rate: a short rise, a plateau, a linear fall to 2%."""
    return min(1.0, progress / 0.01, max(0.02, (1 - progress) / 0.6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where the weights go (a .pt file, not shipped)")
    parser.add_argument("--resume", type=Path, help="go on from these weights")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--start", type=float, default=0.0, help="skip this part of the schedule (0..1)")
    parser.add_argument("--decoder-only", action="store_true", help="keep the latents as they are")
    parser.add_argument("--clips", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--kl", type=float, default=3e-4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    clips = render_clips(training_scenes(), args.clips, seed=args.seed + 1)
    unseen = render_clips([scene for scene in all_scenes() if scene.held_out], 16, seed=args.seed + 2)
    vae = AutoencoderKLWan(**CONFIG).to(args.device)
    if args.resume:
        vae.load_state_dict(torch.load(args.resume)["raw"])
    if args.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    named = [(name, weight) for name, weight in vae.named_parameters() if weight.requires_grad]
    optimisers = Optimisers(named, args.lr, adam_words=("conv_in", "decoder.conv_out", "quant_conv"))
    average = Average(vae, decay=0.998)
    averaged = AutoencoderKLWan(**CONFIG).to(args.device).eval()

    def save() -> None:
        averaged.load_state_dict(average.weights)
        mean, std = latent_statistics(averaged, clips[:128], args.device)
        config = {**CONFIG, "latents_mean": mean, "latents_std": std}
        torch.save({"weights": average.weights, "config": config, "raw": vae.state_dict()}, args.out)
        found = psnr(averaged, unseen, args.device)
        print(f"held-out PSNR: mean {found[0]:.2f} worst {found[1]:.2f}", flush=True)

    args.out.parent.mkdir(parents=True, exist_ok=True)
    began = saved = time.monotonic()
    recent, step = [], 0
    while (elapsed := (time.monotonic() - began) / 60 / args.minutes) < 1:
        progress = args.start + (1 - args.start) * elapsed
        phase = next(phase for phase in PHASES if progress <= phase.until)
        x = crops(clips, phase, rng).to(args.device)
        loss, square = loss_of(vae, x, args.kl, torch.bfloat16)
        loss.backward()
        optimisers.step(learning_rate(progress))
        average.update(vae)
        recent.append(float(square))
        step += 1
        if step % 50 == 0:
            minutes = (time.monotonic() - began) / 60
            print(
                f"{minutes:5.1f} min  step {step}  {phase.size}px x {phase.frames}  "
                f"train {-10 * np.log10(np.mean(recent)):.2f} dB",
                flush=True,
            )
            recent.clear()
        if time.monotonic() - saved > 180:
            save()
            saved = time.monotonic()
    save()


if __name__ == "__main__":
    main()
