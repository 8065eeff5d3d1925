"""Peak memory of each stage's process, run apart and in one go, on a random Wan checkpoint of about 1 GB a model.

    PYTHONPATH=tests python benchmarks/stage_memory.py [--model ID_OR_FOLDER]

Every row is a process of its own; its peak is the kernel's figure (ru_maxrss): JAX, torch, compilation, and the pages of
mapped weight files included. This process stays small, since a child's figure begins at its parent's.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SAMPLING = ["--height", "64", "--width", "64", "--num-frames", "17", "--steps", "4", "--guidance-scale", "4"]
PROMPT = ["--prompt", "a red cat", "--max-sequence-length", "64"]
ALL_LOADED = (
    "import sys, tpuvid; p = tpuvid.load(sys.argv[1]); p.generate('a red cat', height=64, width=64, num_frames=17, "
    "num_inference_steps=4, guidance_scale=4.0, max_sequence_length=64)"
)


def make_checkpoint(folder: Path) -> None:
    """A text encoder and a diffusion model of the real kinds, wide enough that their weights outweigh the libraries."""
    from diffusers import WanTransformer3DModel
    from tpuvid_wan.conformance import RandomWan
    from transformers import UMT5Config, UMT5EncoderModel

    RandomWan(text_dim=1024).save(folder)
    umt5 = UMT5Config(vocab_size=384, d_model=1024, d_kv=64, d_ff=4096, num_layers=16, num_heads=16)
    UMT5EncoderModel(umt5).save_pretrained(folder / "text_encoder")
    WanTransformer3DModel(
        num_attention_heads=16, attention_head_dim=64, in_channels=4, out_channels=4, text_dim=1024, ffn_dim=4096, num_layers=20
    ).save_pretrained(folder / "transformer")  # fmt: skip


def peak(command: list[str]) -> float:
    """GiB that the process of `command` held at most."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: failed")
    return usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="Only write the random checkpoint there.")
    arguments = parser.parse_args()
    if arguments.make:
        return make_checkpoint(arguments.make)
    model = arguments.model
    with tempfile.TemporaryDirectory() as scratch:
        if model is None:
            model = str(Path(scratch) / "checkpoint")
            subprocess.run([sys.executable, "-W", "ignore", __file__, "--make", model], check=True, capture_output=True)
            for part in ("text_encoder", "transformer", "vae"):
                size = sum(f.stat().st_size for f in (Path(model) / part).glob("*.safetensors")) / 2**30
                print(f"{part}: {size:.2f} GiB of weights")
        tpuvid, stages = str(Path(sys.executable).with_name("tpuvid")), ["--output-dir", str(Path(scratch) / "stages")]
        read = ["--input-dir", str(Path(scratch) / "stages")]
        print("| process | peak RSS, GiB |\n|---|---|", flush=True)
        for name, command in (
            ("imports alone", [sys.executable, "-c", "import tpuvid, jax, torch, diffusers"]),
            ("`tpuvid encode`", [tpuvid, "encode", "--model", model, *PROMPT, *stages]),
            ("`tpuvid denoise`", [tpuvid, "denoise", *read, *SAMPLING]),
            ("`tpuvid decode`", [tpuvid, "decode", *read]),
            ("`tpuvid generate` (frees each stage)", [tpuvid, "generate", "--model", model, *PROMPT, *SAMPLING, *stages]),
            ("`Pipeline.generate`, all stages kept loaded", [sys.executable, "-c", ALL_LOADED, model]),
        ):
            print(f"| {name} | {peak(command):.2f} |", flush=True)


if __name__ == "__main__":
    main()
