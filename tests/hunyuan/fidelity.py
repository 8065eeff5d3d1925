"""tpuvid against stock `diffusers.HunyuanVideo15Pipeline`, stage by stage, on one checkpoint. As a script: the table."""

from pathlib import Path

import numpy as np
import tpuvid
from shared.fidelity import Case, Fidelity, compare_stages, print_table, relative
from shared.stock_deepcache import deepcached
from tpuvid_hunyuan.conformance import RandomHunyuan, run_stock, stock_pipeline, stock_streams

CASES = (
    Case(
        "no quotes, 1000 tokens, 9 frames",
        RandomHunyuan(),
        dict(height=32, width=48, num_frames=9, num_inference_steps=4, guidance_scale=6.0, seed=3, max_sequence_length=1000),
        negative_prompt="",
    ),
    Case(
        "quotes in both prompts, three heads, shift 9, rescaled guidance",
        RandomHunyuan(heads=3, rope_dims=(8, 10, 14), refiner_layers=1, shift=9.0, guider={"guidance_rescale": 0.7}, seed=1),
        dict(height=48, width=32, num_frames=13, num_inference_steps=6, guidance_scale=4.0, seed=11, max_sequence_length=60),
        prompt='a sign says "OPEN" and “七点半”, then "OPEN" again',
        negative_prompt='the word "blurry"',
        slow=False,
    ),
    Case(
        "original formulation, shift given, 5 frames, quotes in the negative prompt",
        RandomHunyuan(layers=3, refiner_layers=3, guider={"use_original_formulation": True}, seed=2),
        dict(
            height=64,
            width=16,
            num_frames=5,
            num_inference_steps=5,
            guidance_scale=2.5,
            seed=0,
            max_sequence_length=33,
            flow_shift=3.0,
        ),
        negative_prompt='no "text"',
    ),  # fmt: skip
    Case(
        "one frame, guidance from 20% to 70%, empty prompt",
        RandomHunyuan(guider={"start": 0.2, "stop": 0.7}, channels=8, text_layers=5, seed=4, vae_layers=2),
        dict(height=16, width=64, num_frames=1, num_inference_steps=7, guidance_scale=5.0, seed=2**40, max_sequence_length=40),
        prompt="",
        negative_prompt="blue dog",
    ),
    Case(
        "guider disabled, prompt longer than the tokens",
        RandomHunyuan(guider={"enabled": False}, vae_widths=(8, 16, 16, 32, 32), text_dim=64, glyph_dim=40, shift=1.0, seed=5),
        dict(height=32, width=32, num_frames=9, num_inference_steps=3, seed=8, max_sequence_length=24),
        prompt='a billboard that reads "TPU" stands on the grass beside a long road',
    ),
    Case(
        "DeepCache, four layers, quotes",
        RandomHunyuan(layers=4, seed=7),
        dict(
            height=32,
            width=48,
            num_frames=5,
            num_inference_steps=9,
            guidance_scale=4.0,
            seed=5,
            max_sequence_length=50,
            cache="deepcache",
            cache_start_step=2,
            cache_end_step=8,
            cache_step_interval=3,
        ),
        prompt='a "red" cat',
        slow=False,
    ),  # fmt: skip
    Case(
        "tiled VAE, 2 × 1 tiles, the last one smaller",
        RandomHunyuan(layers=1, seed=8),
        dict(height=272, width=48, num_frames=5, num_inference_steps=2, guidance_scale=3.0, seed=9, max_sequence_length=30),
        vae_tiling=True,
    ),
    Case(
        "guidance scale 1",
        RandomHunyuan(heads=5, layers=1, seed=6),
        dict(height=32, width=16, num_frames=5, num_inference_steps=3, guidance_scale=1.0, seed=1, max_sequence_length=50),
    ),
)


def measure(case: Case, folder: Path) -> Fidelity:
    """Run both, each stage on its own reference input, and the whole from prompt to frames. `folder` gets a checkpoint."""
    source = str(case.checkpoint.save(folder))
    pipe = tpuvid.load(source, dtype="float32", mesh="dp=1,tp=1", vae_tiling=case.vae_tiling)
    config = pipe.spec.configure(prompt=case.prompt, negative_prompt=case.negative_prompt, **case.settings)
    reference = stock_pipeline(source, config)
    if case.vae_tiling:
        reference.vae.enable_tiling()

    def stock(output_type: str) -> np.ndarray:
        transformer, carries = reference.transformer, ("hidden_states", "encoder_hidden_states")
        with deepcached(transformer, transformer.transformer_blocks, config, carries=carries, calls=2):
            return run_stock(reference, config, output_type)

    latents, frames = stock("latent"), stock("np")
    streams = {sign: stock_streams(reference, p) for sign, p in (("", case.prompt), ("negative_", case.negative_prompt))}
    conditioning = pipe.encode_config(config, negative=True)  # of no prompt too, which `encode` refuses
    embeds = []
    for sign, expected in streams.items():
        for name, tensor in expected.items():
            found = conditioning.tensors[f"{sign}prompt_{name}"]
            if "mask" in name:
                np.testing.assert_array_equal(found, tensor.numpy())
            elif not tensor.any():
                assert not found.any() and found.shape == tensor.shape
            else:
                embeds.append(relative(found, tensor.numpy()))
    return compare_stages(pipe, case, conditioning, max(embeds), latents, frames)


if __name__ == "__main__":
    print_table(CASES, measure)
