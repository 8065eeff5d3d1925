"""Train the transformer and the text encoder together, by flow matching on the VAE's latents.

    python train_dit.py --vae runs/vae.pt --out runs/dit.pt --minutes 75

Renders and encodes the training clips once (kept in --latents), then trains; saves the averaged weights every few
minutes and tells how many of 48 held-out captions are drawn right.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import fastdit
import numpy as np
import onepass
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from muon import Average, Optimisers
from sampling import Sampler, TextToVideo, accuracy, latent_scale, sample_of_held_out
from text import dropped, forget_words, make_text_encoder, make_tokenizer, tokens_of
from torch import Tensor
from tpuvid_tiny.grammar import training_scenes
from tpuvid_tiny.render import render_uint8
from train_vae import to_network

HEAD = 32
CAPTION_DROPOUT = 0.10
WORD_DROPOUT = 0.01
TEXT_LENGTHS = (512, 512, 512, 226)  # numbers of text keys to train for: the pipeline's default, and Wan's other habit
TIME_SHIFT = 3.0  # how far training times lean towards noise: where things are is decided there


def transformer_config(width: int, layers: int, text_width: int) -> dict:
    return {
        "num_attention_heads": width // HEAD,
        "attention_head_dim": HEAD,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": text_width,
        "freq_dim": 128,
        "ffn_dim": 4 * width,
        "num_layers": layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
    }


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, count: int, seed: int, device: str) -> dict[str, Tensor]:
    """Normalised latents [count, z, f, h, w] of clips that go through all training scenes in turn, and which."""
    scenes, rng = training_scenes(), np.random.default_rng(seed)
    mean, std = latent_scale(vae.config, device)
    order = np.concatenate([rng.permutation(len(scenes)) for _ in range(-(-count // len(scenes)))])[:count]
    latents = []
    for chunk in np.array_split(order, -(-count // 16)):
        x = to_network(np.stack([render_uint8(scenes[i], rng) for i in chunk])).to(device, torch.bfloat16)
        latents.append(((onepass.encode(vae, x)[0] - mean) / std).half().cpu())
    return {"latents": torch.cat(latents), "scenes": torch.from_numpy(order)}


def cached_latents(path: Path, vae: AutoencoderKLWan, count: int, seed: int, device: str) -> dict[str, Tensor]:
    if not path.exists():
        torch.save(encode_clips(vae, count, seed, device), path)
    return torch.load(path)


def draw_times(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels in (0, 1): logit-normal with a uniform share, shifted towards noise."""
    normal = torch.sigmoid(torch.randn(count, generator=generator))
    uniform = torch.rand(count, generator=generator)
    u = torch.where(torch.rand(count, generator=generator) < 0.3, uniform, normal)
    return TIME_SHIFT * u / (1 + (TIME_SHIFT - 1) * u)


def learning_rate(progress: float) -> float:
    """Scale of the learning rate: a short rise, a plateau, a linear fall to 1%."""
    return min(1.0, progress / 0.01, max(0.01, (1 - progress) / 0.65))


def load_vae(path: Path, device: str) -> AutoencoderKLWan:
    saved = torch.load(path)
    vae = AutoencoderKLWan(**saved["config"]).to(device).eval().requires_grad_(False)
    vae.load_state_dict(saved["weights"])
    return vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae", type=Path, required=True, help="what train_vae.py wrote")
    parser.add_argument("--latents", type=Path, help="where the encoded clips are kept (default: beside --out)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", type=Path, help="go on from these weights")
    parser.add_argument("--start", type=float, default=0.0, help="skip this part of the schedule (0..1)")
    parser.add_argument("--minutes", type=float, default=75)
    parser.add_argument("--clips", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--text-width", type=int, default=128)
    parser.add_argument("--judge-every", type=float, default=12, help="minutes between judgements")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng, generator = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    vae = load_vae(args.vae, args.device)
    data = cached_latents(args.latents or args.out.with_suffix(".latents"), vae, args.clips, args.seed, args.device)
    scenes = training_scenes()

    config = transformer_config(args.width, args.layers, args.text_width)

    def new_parts() -> torch.nn.ModuleDict:
        return torch.nn.ModuleDict(
            {"transformer": WanTransformer3DModel(**config), "text_encoder": make_text_encoder(args.text_width)}
        ).to(args.device)

    parts, averaged, tokenizer = new_parts(), new_parts().eval(), make_tokenizer()
    torch.nn.init.zeros_(parts["transformer"].proj_out.weight)
    outer = ("patch_embedding", "proj_out", "time_embedder", "shared", "relative")
    optimisers = Optimisers(parts.named_parameters(), args.lr, adam_words=outer)
    if args.resume:
        saved = torch.load(args.resume)
        parts.load_state_dict(saved["raw"])
        optimisers.load_state_dict(saved["optimisers"])
    average = Average(parts, decay=0.998)

    def save() -> None:
        raw, state = parts.state_dict(), optimisers.state_dict()
        torch.save({"weights": average.weights, "raw": raw, "config": config, "optimisers": state}, args.out)

    def judge() -> None:
        averaged.load_state_dict(average.weights)
        model = TextToVideo(tokenizer, averaged["text_encoder"], averaged["transformer"], vae)
        shares = accuracy(model, sample_of_held_out(48), Sampler())
        print("held out: " + "  ".join(f"{name} {share:.2f}" for name, share in shares.items()), flush=True)

    began = saved_at = judged_at = time.monotonic()
    recent, step = [], 0
    while (elapsed := (time.monotonic() - began) / 60 / args.minutes) < 1:
        progress = args.start + (1 - args.start) * elapsed
        picked = torch.randint(len(data["scenes"]), (args.batch,), generator=generator)
        captions = [scenes[i].varied_caption(rng) for i in data["scenes"][picked].tolist()]
        ids, mask = tokens_of(dropped(captions, CAPTION_DROPOUT, rng), tokenizer)
        ids = forget_words(ids, WORD_DROPOUT, generator)
        lengths = torch.tensor([rng.choice(TEXT_LENGTHS) for _ in captions])
        clean = data["latents"][picked].float()
        noise = torch.randn(clean.shape, generator=generator)
        sigma = draw_times(args.batch, generator)
        clean, noise, sigma, ids, mask, lengths = (value.to(args.device) for value in (clean, noise, sigma, ids, mask, lengths))

        noisy = torch.lerp(clean, noise, sigma[:, None, None, None, None])
        words = parts["text_encoder"](ids, mask).last_hidden_state
        text, bias = fastdit.with_padding(words, mask, lengths)
        velocity = fastdit.forward(parts["transformer"], noisy, 1000 * sigma, text, bias, torch.bfloat16)
        loss = (velocity - (noise - clean)).square().mean()
        loss.backward()
        optimisers.step(learning_rate(progress))
        average.update(parts)

        recent.append(loss.item())
        step += 1
        now = time.monotonic()
        if step % 50 == 0:
            print(f"{(now - began) / 60:5.1f} min  step {step}  loss {np.mean(recent):.4f}", flush=True)
            recent.clear()
        if now - saved_at > 150:
            save()
            saved_at = now
        if now - judged_at > 60 * args.judge_every:
            judge()
            judged_at = now
    save()
    judge()


if __name__ == "__main__":
    main()
