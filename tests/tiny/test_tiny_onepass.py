"""The fast forward passes of wan-tiny's training compute what diffusers' modules compute."""

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TRAINING = Path(__file__).parents[2] / "packages" / "tiny" / "training"


@pytest.fixture(autouse=True)
def training_scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(TRAINING))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == TRAINING:
            del sys.modules[name]


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_vae_in_one_pass(frames):
    import onepass

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1, z_dim=4, temperal_downsample=[False, True, True]
    ).eval()
    x = torch.rand(1, 3, frames, 16, 24) * 2 - 1
    with torch.no_grad():
        mean, _ = onepass.encode(vae, x)
        torch.testing.assert_close(mean, vae.encode(x).latent_dist.mode(), atol=1e-5, rtol=1e-5)
        clip = onepass.decode(vae, mean).clamp(-1, 1)  # as diffusers does
        torch.testing.assert_close(clip, vae.decode(mean).sample, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [12, 226, 512])
def test_one_key_stands_for_all_padding(length):
    import fastdit

    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, text_dim=24, freq_dim=32, ffn_dim=64, num_layers=2
    ).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    x, time, words = torch.randn(2, 16, 2, 4, 6), torch.tensor([300.0, 900.0]), torch.randn(2, 8, 24)
    mask = torch.tensor([[1] * 3 + [0] * 5, [1] * 7 + [0]])
    padded = torch.nn.functional.pad(words * mask[..., None], (0, 0, 0, length - 8))
    with torch.no_grad():
        text, bias = fastdit.with_padding(words, mask, torch.tensor([length, length]))
        fast = fastdit.forward(model, x, time, text, bias, torch.float32)
        torch.testing.assert_close(fast, model(x, time, padded).sample, atol=1e-4, rtol=1e-4)
