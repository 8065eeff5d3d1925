"""tpuvid against stock `diffusers.WanPipeline`, stage by stage, on one checkpoint folder. Run as a script, it prints the table."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tpuvid
from diffusers import WanPipeline
from stock_deepcache import deepcached
from tpuvid.stages import Latents
from wan.random_checkpoint import RandomWan


@dataclass(frozen=True)
class Case:
    name: str
    checkpoint: RandomWan | str
    """What to make, or a registered model id."""
    settings: dict
    prompt: str = "a red cat &amp;amp; the  moon"
    negative_prompt: str = "blue dog"
    vae_tiling: bool = False


CASES = (
    Case("two heads, UniPC", RandomWan(), dict(height=48, width=80, num_frames=9, num_inference_steps=6, guidance_scale=3.0, seed=3)),
    Case(
        "three heads of 20, no cross-attention norm, 13 frames",
        RandomWan(heads=3, head_dim=20, cross_attn_norm=False, vae_dim=4, dim_mult=(1, 2, 4, 4), seed=1),
        dict(height=48, width=112, num_frames=13, num_inference_steps=7, guidance_scale=5.0, seed=11, max_sequence_length=77),
    ),
    Case(
        "Euler, shift 5, three layers, guidance off",
        RandomWan(layers=3, euler=True, flow_shift=5.0, channels=6, seed=2),
        dict(height=80, width=16, num_frames=5, num_inference_steps=4, guidance_scale=1.0, seed=0),
        negative_prompt="",
    ),
    Case(
        "one frame, shift given",
        RandomWan(heads=5, head_dim=12, layers=1, seed=4),
        dict(height=16, width=48, num_frames=1, num_inference_steps=3, guidance_scale=2.0, seed=2**40, flow_shift=8.0),
    ),
    Case(
        "DeepCache, four layers",
        RandomWan(layers=4, seed=6),
        dict(height=32, width=48, num_frames=5, num_inference_steps=9, guidance_scale=4.0, seed=5,
             cache="deepcache", cache_start_step=2, cache_end_step=8, cache_step_interval=3),
    ),
    Case(
        "tiled VAE, 2 × 3 tiles, the last ones smaller",
        RandomWan(layers=1, seed=6),
        dict(height=272, width=400, num_frames=9, num_inference_steps=2, guidance_scale=3.0, seed=9),
        vae_tiling=True,
    ),
    Case("wan-tiny", "wan-tiny", dict(height=64, width=64, num_frames=17, num_inference_steps=24, guidance_scale=4.0, seed=42),
         prompt="a red circle moving right on a black background", negative_prompt=""),
)  # fmt: skip


@dataclass(frozen=True)
class Fidelity:
    """Largest absolute difference of each stage, relative to the reference tensor's largest value; frames in steps of 255."""

    embeds: float
    latents: float
    decoded: float
    frames: float


def measure(case: Case, folder: Path) -> Fidelity:
    """Run both, each stage on its own reference input, and the whole from prompt to frames. A checkpoint is made in `folder`."""
    if isinstance(case.checkpoint, RandomWan):
        source = str(case.checkpoint.save(folder))
        pipe = tpuvid.load(source, dtype="float32", mesh="dp=1,tp=1", vae_tiling=case.vae_tiling)
    else:
        pipe = tpuvid.load(case.checkpoint, dtype="float32", mesh="dp=1,tp=1")
        source = str(pipe.checkpoint.folder)
    reference = WanPipeline.from_pretrained(source, torch_dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    if case.vae_tiling:
        reference.vae.enable_tiling()
    settings = dict(case.settings)
    if shift := settings.get("flow_shift"):
        reference.scheduler = type(reference.scheduler).from_config(reference.scheduler.config, flow_shift=shift)

    config = pipe.spec.configure(**settings)

    def stock(output_type: str):
        arguments = {k: v for k, v in settings.items() if k not in ("seed", "flow_shift") and not k.startswith("cache")}
        generator = torch.Generator().manual_seed(config.seed)
        calls = 2 if config.do_classifier_free_guidance else 1
        transformer = reference.transformer
        with deepcached(transformer, transformer.blocks, config, carries=("hidden_states",), calls=calls):
            output = reference(case.prompt, case.negative_prompt, generator=generator, output_type=output_type, **arguments)
        return output.frames

    latents, frames = stock("latent").numpy(), stock("np")
    length = settings.get("max_sequence_length", 512)
    with torch.no_grad():
        embeds, _ = reference.encode_prompt(case.prompt, do_classifier_free_guidance=False, max_sequence_length=length)

    conditioning = pipe.encode(case.prompt, case.negative_prompt, max_sequence_length=length)
    found = pipe.denoise(conditioning, **{k: v for k, v in settings.items() if k != "max_sequence_length"})
    decoded = pipe.decode(Latents(model_id=pipe.spec.model_id, latents=latents, config=found.config)).frames
    whole = pipe.generate(case.prompt, negative_prompt=case.negative_prompt, **settings).frames
    return Fidelity(
        embeds=_relative(conditioning.tensors["prompt_embeds"], embeds.numpy()),
        latents=_relative(found.latents, latents),
        decoded=_relative(decoded, frames),
        frames=float(np.abs(whole - frames).max() * 255),
    )


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


if __name__ == "__main__":
    print("| checkpoint | embeddings | latents | decode | frames (of 255) |\n|---|---|---|---|---|")
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            f = measure(case, Path(folder))
        print(f"| {case.name} | {f.embeds:.1e} | {f.latents:.1e} | {f.decoded:.1e} | {f.frames:.4f} |", flush=True)
