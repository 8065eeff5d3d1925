"""What other tools call what is called otherwise here, or isn't here: known before letters are compared."""

from __future__ import annotations

TEXT_ALONE = "tpuvid makes videos of text alone"
OURS = {
    "--base-seed": "--seed", "--batch": "--batch-size", "--cfg": "--guidance-scale", "--ckpt-dir": "--model",
    "--embedded-cfg-scale": "--guidance-scale", "--frame-num": "--num-frames", "--frame-rate": "--fps",
    "--guidance": "--guidance-scale", "--infer-steps": "--num-inference-steps", "--length": "--num-frames",
    "--lora": "--lora-path", "--lora-strength": "--lora-scale", "--model-base": "--model", "--model-id": "--model",
    "--n-prompt": "--negative-prompt", "--neg-prompt": "--negative-prompt", "--num-steps": "--num-inference-steps",
    "--out": "--output", "--precision": "--dtype", "--sample-guide-scale": "--guidance-scale",
    "--sample-shift": "--flow-shift", "--sample-steps": "--num-inference-steps", "--save-dir": "--output-dir",
    "--save-file": "--output", "--save-path": "--output-dir", "--timestep-shift": "--flow-shift", "--torch-dtype": "--dtype",
    "--video-length": "--num-frames", "--video-size": "--height and --width", "--size": "--height and --width",
    "--resolution": "--height and --width", "--enable-tiling": "--vae-tiling", "--enable-vae-tiling": "--vae-tiling",
    "--offload-model": "--text-encoder-device cpu", "--force": "--overwrite", "--yes": "--overwrite",
}  # fmt: skip
"""Flags of Wan's, HunyuanVideo's, CogVideoX's and diffusers' scripts, FastVideo and ComfyUI, with ours."""
ABSENT = {
    "--image": TEXT_ALONE, "--image-path": TEXT_ALONE, "--init-image": TEXT_ALONE, "--video": TEXT_ALONE,
    "--video-path": TEXT_ALONE, "--last-image": TEXT_ALONE,
    "--scheduler": "the checkpoint's own is used", "--sampler": "the checkpoint's own scheduler is used",
    "--sample-solver": "the checkpoint's own scheduler is used", "--device": "JAX_PLATFORMS=tpu or cpu chooses the device",
    "--num-gpus": "--mesh says how the model lies over devices", "--ulysses-size": "--mesh dp=2,sp=4 splits the tokens",
    "--ring-size": "--mesh dp=2,sp=4 splits the tokens",
}  # fmt: skip
"""What there is no flag for, with what there is instead."""


def meant(flag: str) -> str | None:
    """What to say of a flag that another tool has; None for one that isn't known."""
    if flag in OURS:
        return f"Here it is {OURS[flag]}."
    return f"There is none: {ABSENT[flag]}." if flag in ABSENT else None
