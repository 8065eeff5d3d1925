"""Seconds per stage: tpuvid against stock diffusers.WanPipeline, same process, same CPU, same checkpoint, fp32.

    python benchmarks/against_diffusers.py [--model wan-tiny] [--repeats 5]

Both run once untimed (compilation, lazy initialisation), then in turns; the table shows the median of each.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import tpuvid
from diffusers import WanPipeline
from tpuvid.contract import GenerationConfig
from tpuvid.runs.pipeline import Pipeline

PROMPT = "a red circle moving right on a black background"


def stages_of_tpuvid(pipe: Pipeline, config: GenerationConfig) -> dict[str, Callable[[], object]]:
    conditioning = pipe.encode_config(config)
    latents = pipe.denoise_config(conditioning, config)
    return {
        "encode": lambda: pipe.encode_config(config),
        "denoise": lambda: pipe.denoise_config(conditioning, config),
        "decode": lambda: pipe.decode(latents),
    }


@torch.no_grad()
def stages_of_diffusers(pipe: WanPipeline, config: GenerationConfig) -> dict[str, Callable[[], object]]:
    sampling = dict(
        height=config.height, width=config.width, num_frames=config.num_frames,
        num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale,
    )  # fmt: skip
    length = config.max_sequence_length

    def encode():
        return pipe.encode_prompt(config.prompt, max_sequence_length=length)

    def denoise():
        return pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, output_type="latent", **sampling).frames

    def decode():
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1) for values in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
        )
        return pipe.video_processor.postprocess_video(pipe.vae.decode(latents * std + mean).sample, output_type="np")

    embeds, negative = encode()
    latents = denoise()
    return {"encode": encode, "denoise": denoise, "decode": decode}


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="wan-tiny")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    pipe = tpuvid.load(args.model, dtype="float32", mesh="dp=1,tp=1")
    config = pipe.spec.configure(prompt=PROMPT)
    reference = WanPipeline.from_pretrained(pipe.checkpoint.folder)
    reference.set_progress_bar_config(disable=True)
    ours, stock = stages_of_tpuvid(pipe, config), stages_of_diffusers(reference, config)

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ours}
    with torch.no_grad():
        for name in ours:
            seconds(ours[name]), seconds(stock[name])
            for _ in range(args.repeats):
                times[name].append((seconds(ours[name]), seconds(stock[name])))

    print(f"{args.model}, {config.width}x{config.height}x{config.num_frames}, {config.num_inference_steps} steps, CPU, fp32, "
          f"median of {args.repeats}")  # fmt: skip
    print("| stage | tpuvid s | diffusers s | ratio |\n|---|---|---|---|")
    rows = {name: tuple(statistics.median(column) for column in zip(*pairs, strict=True)) for name, pairs in times.items()}
    rows["all"] = tuple(sum(column) for column in zip(*rows.values(), strict=True))
    for name, (a, b) in rows.items():
        print(f"| {name} | {a:.3f} | {b:.3f} | {b / a:.2f}× |")


if __name__ == "__main__":
    main()
