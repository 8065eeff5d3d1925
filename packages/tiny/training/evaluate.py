"""Measure the finished checkpoint: does a clip show what its caption says, for combinations never trained on?

    python evaluate.py --engine diffusers --out evaluation.json

Every held-out (colour, shape, motion) triple is generated on every background, and read back from the pixels by
`tpuvid_tiny.score`. The same scorer reads rendered clips of the same captions, to show what it can be trusted with.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tpuvid_tiny
from tpuvid_tiny.grammar import SHAPES, Scene, all_scenes, held_out_scenes
from tpuvid_tiny.render import FRAMES, HEIGHT, WIDTH, render, render_uint8
from tpuvid_tiny.score import read_clip

CHECKPOINT = Path(tpuvid_tiny.__file__).parent / "checkpoint"
ATTRIBUTES = ("colour", "shape", "motion", "background", "all")

Generate = Callable[[list[Scene], int], np.ndarray]


def with_diffusers(args: argparse.Namespace) -> Generate:
    """Stock `WanPipeline`, with its default text length of 512."""
    import torch
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    pipeline.set_progress_bar_config(disable=True)

    def generate(scenes: list[Scene], seed: int) -> np.ndarray:
        return pipeline(
            prompt=[scene.caption() for scene in scenes],
            generator=torch.Generator().manual_seed(seed),
            height=HEIGHT,
            width=WIDTH,
            num_frames=FRAMES,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            output_type="np",
        ).frames

    return generate


def with_tpuvid(args: argparse.Namespace) -> Generate:
    """The same checkpoint through tpuvid."""
    import tpuvid

    model = tpuvid.load(str(args.model))

    def one(scene: Scene, seed: int) -> np.ndarray:
        return model.generate(
            prompt=scene.caption(),
            negative_prompt="",
            height=HEIGHT,
            width=WIDTH,
            num_frames=FRAMES,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            seed=seed,
        ).frames[0]

    def generate(scenes: list[Scene], seed: int) -> np.ndarray:
        return np.stack([np.asarray(one(scene, seed + i)) for i, scene in enumerate(scenes)])

    return generate


ENGINES = {"diffusers": with_diffusers, "tpuvid": with_tpuvid}


def shares(verdicts: list[dict[str, bool]]) -> dict[str, float]:
    """The share of clips for which each attribute is right."""
    return {name: round(float(np.mean([verdict[name] for verdict in verdicts])), 4) for name in ATTRIBUTES}


def judge(scenes: list[Scene], generate: Generate, batch: int, seed: int) -> tuple[list[dict], list[np.ndarray]]:
    """The verdict on one clip per scene, and the clips."""
    clips = []
    for start in range(0, len(scenes), batch):
        clips += list(generate(scenes[start : start + batch], seed + start))
    return [read_clip(clip).compare(scene) for clip, scene in zip(clips, scenes, strict=True)], clips


def rendered(scenes: list[Scene], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([render(scene, rng) for scene in scenes])


def reconstruction(model: Path, count: int, device: str) -> dict[str, float]:
    """PSNR in dB of held-out clips through the stock VAE's encode and decode."""
    import torch
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae", dtype=torch.float32).to(device)
    rng = np.random.default_rng(1)
    scenes = [scene for scene in all_scenes() if scene.held_out]
    each = []
    for index in np.linspace(0, len(scenes) - 1, count).astype(int):
        clip = torch.from_numpy(render_uint8(scenes[index], rng)).permute(3, 0, 1, 2)[None].to(device) / 127.5 - 1
        with torch.no_grad():
            again = vae.decode(vae.encode(clip).latent_dist.mode()).sample
        each.append(float(-10 * torch.log10((again - clip).square().mean() / 4)))
    return {"clips": count, "mean_db": round(float(np.mean(each)), 2), "worst_db": round(min(each), 2)}


def contact_sheet(clips: list[np.ndarray], file: Path, columns: int = 4) -> None:
    """Every clip as a strip of five frames, ``columns`` strips side by side."""
    from PIL import Image

    strips = [np.concatenate(list(clip[::4]), axis=1) for clip in clips]
    strips += [np.zeros_like(strips[0])] * (-len(strips) % columns)
    rows = [np.concatenate(strips[i : i + columns], axis=1) for i in range(0, len(strips), columns)]
    Image.fromarray((255 * np.concatenate(rows)).round().astype(np.uint8)).save(file)


def table(result: dict) -> str:
    """The result as a Markdown table."""
    lines = ["| clips | n | colour | shape | motion | background | colour, shape and motion |"]
    lines.append("|---" * 7 + "|")
    for name, row in result["accuracy"].items():
        cells = " | ".join(f"{100 * row[attribute]:.1f}%" for attribute in ATTRIBUTES)
        lines.append(f"| {name} | {row['n']} | {cells} |")
    vae = result["reconstruction"]
    lines.append("")
    lines.append(f"VAE, {vae['clips']} held-out clips: {vae['mean_db']:.1f} dB mean PSNR, {vae['worst_db']:.1f} dB worst.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=ENGINES, default="diffusers")
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--limit", type=int, help="judge only this many captions")
    parser.add_argument("--reconstructions", type=int, default=36)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the result as JSON, and as a table beside it")
    parser.add_argument("--sheet", type=Path, help="write a picture of all clips")
    args = parser.parse_args()

    scenes = held_out_scenes()
    if args.limit:
        scenes = [scenes[i] for i in np.linspace(0, len(scenes) - 1, args.limit).astype(int)]
    began = time.monotonic()
    verdicts, clips = judge(scenes, ENGINES[args.engine](args), args.batch, args.seed)
    seconds = time.monotonic() - began
    baseline = [read_clip(clip).compare(scene) for clip, scene in zip(rendered(scenes, 1), scenes, strict=True)]
    rows = {"generated, held-out combinations": verdicts, "rendered (the scorer itself)": baseline}
    for shape in SHAPES:
        rows[f"– generated, {shape}"] = [v for v, scene in zip(verdicts, scenes, strict=True) if scene.shape == shape]
    result = {
        "engine": args.engine,
        "settings": {"steps": args.steps, "guidance": args.guidance, "seed": args.seed},
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {args.device}",
        "seconds_per_clip": round(seconds / len(scenes), 2),
        "accuracy": {name: {"n": len(row), **shares(row)} for name, row in rows.items()},
        "reconstruction": reconstruction(args.model, args.reconstructions, args.device),
        "wrong": [
            {"caption": scene.caption(), "read": vars(read_clip(clip))}
            for scene, clip, verdict in zip(scenes, clips, verdicts, strict=True)
            if not verdict["all"]
        ],
    }
    print(table(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(result))
    if args.sheet:
        contact_sheet(clips, args.sheet)


if __name__ == "__main__":
    main()
