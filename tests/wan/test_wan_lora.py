"""LoRA files against stock diffusers with PEFT, which runs them unmerged."""

import json

import numpy as np
import pytest
import torch
import tpuvid
from diffusers import WanPipeline
from safetensors.torch import save_file
from tpuvid import InputError
from tpuvid.family import AdaptedWeights, LowRank, Offset, Weights
from wan.conftest import SMALL

WIDTH, FFN, RANK = 32, 56, 3
LAYERS = {
    "attn1.to_q": ("self_attn.q", WIDTH, WIDTH),
    "attn1.to_out.0": ("self_attn.o", WIDTH, WIDTH),
    "ffn.net.0.proj": ("ffn.0", FFN, WIDTH),
    "ffn.net.2": ("ffn.2", WIDTH, FFN),
}


def random_lora(style):
    """State dict and metadata of a LoRA on both blocks, as diffusers ("diffusers") or original code ("original") saves it."""
    torch.manual_seed(0)
    state = {}
    for block in range(2):
        for layer, (original, out, into) in LAYERS.items():
            down, up = torch.randn(RANK, into) * 0.2, torch.randn(out, RANK) * 0.2
            if style == "diffusers":
                name = f"transformer.blocks.{block}.{layer}"
                state |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
            else:
                name = f"diffusion_model.blocks.{block}.{original}"
                state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(6.0)}
    modules = [
        name.removeprefix("transformer.").removesuffix(".lora_A.weight") for name in state if name.endswith("lora_A.weight")
    ]
    adapter = {"transformer.r": RANK, "transformer.lora_alpha": 6, "transformer.target_modules": modules}
    return state, {"format": "pt", "lora_adapter_metadata": json.dumps(adapter)} if style == "diffusers" else {"format": "pt"}


@pytest.mark.parametrize("style", ["diffusers", "original"])
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_merged_equals_diffusers(checkpoint, pipe, tmp_path, style, scale):
    state, metadata = random_lora(style)
    path = tmp_path / "lora.safetensors"
    save_file(state, path, metadata)
    stock = WanPipeline.from_pretrained(checkpoint)
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(str(tmp_path), weight_name="lora.safetensors", adapter_name="a")
    stock.set_adapters("a", scale)
    arguments = {k: v for k, v in SMALL.items() if k != "seed"}
    expected = stock(
        "a cat", generator=torch.Generator().manual_seed(SMALL["seed"]), output_type="latent", **arguments
    ).frames.numpy()

    adapted = tpuvid.load(str(checkpoint), lora_path=path, lora_scale=scale)
    found = adapted.denoise(adapted.encode("a cat"), **SMALL).latents
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    plain = pipe.denoise(pipe.encode("a cat"), **SMALL).latents
    assert np.abs(found - plain).max() > 0.01 * np.abs(plain).max(), "the LoRA changes something"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: {k.replace("blocks.1", "blocks.7"): v for k, v in s.items()},
            "blocks.7.attn1.to_q.weight.*made for another model",
        ),
        (
            lambda s: {
                k: (v[:, :5].contiguous() if k.endswith("blocks.0.attn1.to_q.lora_A.weight") else v) for k, v in s.items()
            },
            r"here it is \(32, 32\)",
        ),
        (lambda s: {k: v for k, v in s.items() if not k.endswith("blocks.0.attn1.to_q.lora_B.weight")}, "without its lora_B"),
        (lambda s: {"something.else": torch.zeros(2)}, "no LoRA of a Wan transformer"),
    ],
)
def test_a_lora_of_another_model_is_refused(checkpoint, pipe, tmp_path, change, message):
    save_file(change(random_lora("diffusers")[0]), tmp_path / "lora.safetensors")
    adapted = tpuvid.load(str(checkpoint), lora_path=tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match=message):
        adapted.denoise(pipe.encode("a cat"), **SMALL)


@pytest.mark.parametrize("content, message", [(None, "does not exist"), (b"PK pickle", "truncated or foreign")])
def test_an_unreadable_lora_is_refused_before_anything_loads(checkpoint, tmp_path, content, message):
    path = tmp_path / "lora.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        tpuvid.load(str(checkpoint), lora_path=path)
    with pytest.raises(InputError, match="lora_scale=nan"):
        tpuvid.load(str(checkpoint), lora_path=path, lora_scale=float("nan"))


def test_parts_of_adapted_weights_are_parts_of_the_whole(tmp_path):
    rng = np.random.default_rng(0)
    value, bias = rng.normal(size=(6, 4)).astype(np.float32), np.ones(6, np.float32)
    save_file({"w": torch.from_numpy(value), "b": torch.from_numpy(bias)}, tmp_path / "m.safetensors")
    delta = LowRank(rng.normal(size=(2, 4)).astype(np.float32), rng.normal(size=(6, 2)).astype(np.float32), 0.5)
    weights = AdaptedWeights(Weights([tmp_path / "m.safetensors"]), {"w": [delta, delta], "b": [Offset(bias)]}, "test")
    whole = value + delta.up @ delta.down
    np.testing.assert_allclose(weights.read("w"), whole, rtol=1e-6)
    np.testing.assert_allclose(weights.read("w", (slice(2, 5), slice(1, 3))), whole[2:5, 1:3], rtol=1e-6)
    np.testing.assert_allclose(weights.read("b", (slice(0, 2),)), 2.0)
