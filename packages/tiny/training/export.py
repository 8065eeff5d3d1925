"""Write the trained parts as one diffusers folder that stock `WanPipeline.from_pretrained` loads.

python export.py --vae runs/vae.pt --dit runs/dit.pt --out ../src/tpuvid_tiny/checkpoint
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from sampling import make_scheduler
from text import make_text_encoder, make_tokenizer
from torch import nn

LARGEST_FOLDER = 15_000_000  # bytes: what the repository is willing to carry


def part(weights: dict, prefix: str) -> dict:
    """The entries of a state dict below ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def build_pipeline(vae_file: Path, dit_file: Path, flow_shift: float) -> WanPipeline:
    saved_vae, saved = torch.load(vae_file, map_location="cpu"), torch.load(dit_file, map_location="cpu")
    vae = AutoencoderKLWan(**saved_vae["config"])
    vae.load_state_dict(saved_vae["weights"])
    transformer = WanTransformer3DModel(**saved["config"])
    transformer.load_state_dict(part(saved["weights"], "transformer."))
    text_encoder = make_text_encoder(saved["config"]["text_dim"])
    text_encoder.load_state_dict(part(saved["weights"], "text_encoder."))
    return WanPipeline(
        tokenizer=make_tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=make_scheduler(flow_shift),
    )


def halve(model: nn.Module) -> None:
    """Round all weights to float16, which is how they are stored; refuse those that float16 cannot hold."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight.detach().half()).all():
            raise ValueError(f"{name} does not fit float16: largest {float(weight.abs().max()):.3g}")
        weight.data = weight.data.half()


def change(file: Path, **entries: object) -> None:
    """Set entries of a JSON file."""
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | entries, indent=2, sort_keys=True) + "\n")


def write(pipeline: WanPipeline, folder: Path) -> int:
    """Save the folder; returns its size in bytes."""
    for model in (pipeline.text_encoder, pipeline.transformer, pipeline.vae):
        halve(model)
    if folder.exists():
        shutil.rmtree(folder)
    pipeline.save_pretrained(folder, safe_serialization=True)
    # The weights are stored in half precision but meant to run in single: "auto" loaders read the type from here.
    change(folder / "text_encoder" / "config.json", dtype="float32")
    # transformers 5 writes a class name that transformers 4 does not know; both know this one.
    change(folder / "model_index.json", tokenizer=["transformers", "PreTrainedTokenizerFast"])
    change(folder / "tokenizer" / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > LARGEST_FOLDER:
        raise ValueError(f"{folder} holds {size} bytes; at most {LARGEST_FOLDER} are wanted: train a smaller model")
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--dit", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; an older one is replaced")
    parser.add_argument("--flow-shift", type=float, default=3.0)
    args = parser.parse_args()
    size = write(build_pipeline(args.vae, args.dit, args.flow_shift), args.out)
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
