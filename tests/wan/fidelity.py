"""tpuvid against stock `diffusers.WanPipeline`, stage by stage, on one checkpoint. As a script it prints the table."""

from pathlib import Path

import torch
import tpuvid
from shared.fidelity import Case, Fidelity, compare_stages, print_table, relative
from shared.stock_deepcache import deepcached
from tpuvid_wan.conformance import RandomWan, run_stock, stock_pipeline

CASES = (
    Case(
        "two heads, UniPC",
        RandomWan(),
        dict(height=48, width=80, num_frames=9, num_inference_steps=6, guidance_scale=3.0, seed=3),
    ),
    Case(
        "three heads of 20, no cross-attention norm, 13 frames",
        RandomWan(heads=3, head_dim=20, cross_attn_norm=False, vae_dim=4, dim_mult=(1, 2, 4, 4), seed=1),
        dict(height=48, width=112, num_frames=13, num_inference_steps=7, guidance_scale=5.0, seed=11, max_sequence_length=77),
        slow=False,
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
        slow=False,
    ),
    Case(
        "tiled VAE, 2 × 1 tiles, the last one smaller",
        RandomWan(layers=1, seed=6),
        dict(height=272, width=48, num_frames=5, num_inference_steps=2, guidance_scale=3.0, seed=9),
        vae_tiling=True,
    ),
)  # fmt: skip
TINY = Case(
    "wan-tiny",
    "wan-tiny",
    dict(height=64, width=64, num_frames=17, num_inference_steps=24, guidance_scale=4.0, seed=42),
    prompt="a red circle moving right on a black background",
    negative_prompt="",
)
"""The case of another package: tests/tiny runs it."""


def measure(case: Case, folder: Path) -> Fidelity:
    """Run both, each stage on its own reference input, and the whole from prompt to frames. `folder` gets a checkpoint."""
    if isinstance(case.checkpoint, RandomWan):
        source = str(case.checkpoint.save(folder))
        pipe = tpuvid.load(source, dtype="float32", mesh="dp=1,tp=1", vae_tiling=case.vae_tiling)
    else:
        pipe = tpuvid.load(case.checkpoint, dtype="float32", mesh="dp=1,tp=1")
        source = str(pipe.checkpoint.folder)
    config = pipe.spec.configure(prompt=case.prompt, negative_prompt=case.negative_prompt, **case.settings)
    reference = stock_pipeline(source, config)
    if case.vae_tiling:
        reference.vae.enable_tiling()

    def stock(output_type: str):
        calls = 2 if config.do_classifier_free_guidance else 1
        transformer = reference.transformer
        with deepcached(transformer, transformer.blocks, config, carries=("hidden_states",), calls=calls):
            return run_stock(reference, config, output_type)

    latents, frames = stock("latent"), stock("np")
    length = config.max_sequence_length
    with torch.no_grad():
        embeds, _ = reference.encode_prompt(case.prompt, do_classifier_free_guidance=False, max_sequence_length=length)

    conditioning = pipe.encode(case.prompt, case.negative_prompt, max_sequence_length=length)
    error = relative(conditioning.tensors["prompt_embeds"], embeds.numpy())
    return compare_stages(pipe, case, conditioning, error, latents, frames)


if __name__ == "__main__":
    print_table((*CASES, TINY), measure)
