"""tpuvid against stock `diffusers.CogVideoXPipeline`, stage by stage, on one checkpoint. As a script it prints the table."""

from pathlib import Path

import torch
import tpuvid
from shared.fidelity import Case, Fidelity, compare_stages, print_table, relative
from shared.stock_deepcache import deepcached
from tpuvid_cogvideox.conformance import RandomCogVideoX, run_stock, stock_pipeline

CASES = (
    Case(
        "DDIM, 9 frames (latents padded from 3 to 4)",
        RandomCogVideoX(),
        dict(height=48, width=80, num_frames=9, num_inference_steps=6, guidance_scale=3.0, seed=3),
        slow=False,
    ),
    Case(
        "DPM, 17 frames, three heads of 32",
        RandomCogVideoX(heads=3, head_dim=32, channels=6, dpm=True, seed=1),
        dict(height=32, width=112, num_frames=17, num_inference_steps=7, guidance_scale=6.0, seed=11, max_sequence_length=226),
    ),
    Case(
        "DPM, 13 frames (4 latents, not padded), guidance off",
        RandomCogVideoX(layers=3, dpm=True, seed=2, vae_widths=(8, 8, 16, 16)),
        dict(height=80, width=16, num_frames=13, num_inference_steps=4, guidance_scale=1.0, seed=0),
        negative_prompt="",
    ),
    Case(
        "DDIM, one frame, no negative prompt, five heads",
        RandomCogVideoX(heads=5, layers=1, seed=4),
        dict(height=16, width=48, num_frames=1, num_inference_steps=3, guidance_scale=2.0, seed=2**40, max_sequence_length=7),
        negative_prompt="",
    ),
    Case(
        "DDIM, dynamic CFG",
        RandomCogVideoX(seed=6),
        dict(height=32, width=48, num_frames=9, num_inference_steps=8, guidance_scale=5.0, seed=9, use_dynamic_cfg=True),
    ),
    Case(
        "DPM, DeepCache, three layers",
        RandomCogVideoX(layers=3, dpm=True, seed=7),
        dict(
            height=32,
            width=48,
            num_frames=9,
            num_inference_steps=9,
            guidance_scale=4.0,
            seed=5,
            cache="deepcache",
            cache_start_step=2,
            cache_end_step=8,
            cache_step_interval=3,
        ),
        slow=False,
    ),
    Case(
        "CogVideoX 1.0 (no patches in time), DPM",
        RandomCogVideoX(patch_size_t=None, dpm=True, snr_shift_scale=3.0, seed=5),
        dict(height=64, width=48, num_frames=9, num_inference_steps=5, guidance_scale=6.0, seed=8),
    ),
    Case(
        "tiled VAE, 3 × 4 tiles, the last ones smaller",
        RandomCogVideoX(layers=1, dpm=True, vae_size=(96, 80), seed=6),
        dict(height=112, width=112, num_frames=13, num_inference_steps=2, guidance_scale=6.0, seed=9),
        vae_tiling=True,
    ),
)


def measure(case: Case, folder: Path) -> Fidelity:
    """Run both, each stage on its own reference input, and the whole from prompt to frames. `folder` gets a checkpoint."""
    source = str(case.checkpoint.save(folder))
    pipe = tpuvid.load(source, dtype="float32", mesh="dp=1,tp=1", vae_tiling=case.vae_tiling)
    config = pipe.spec.configure(prompt=case.prompt, negative_prompt=case.negative_prompt, **case.settings)
    reference = stock_pipeline(source)
    if case.vae_tiling:
        reference.vae.enable_tiling()

    def stock(output_type: str):
        transformer, carries = reference.transformer, ("hidden_states", "encoder_hidden_states")
        with deepcached(transformer, transformer.transformer_blocks, config, carries=carries, calls=1):
            return run_stock(reference, config, output_type)

    latents, frames = stock("latent"), stock("np")
    length = config.max_sequence_length
    with torch.no_grad():
        embeds, _ = reference.encode_prompt(case.prompt, do_classifier_free_guidance=False, max_sequence_length=length)

    conditioning = pipe.encode(case.prompt, case.negative_prompt, max_sequence_length=length)
    error = relative(conditioning.tensors["prompt_embeds"], embeds.numpy())
    return compare_stages(pipe, case, conditioning, error, latents, frames)


if __name__ == "__main__":
    print_table(CASES, measure)
