import json
import shutil
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import sentencepiece
import torch
import tpuvid
from cogvideox.conftest import SMALL
from diffusers import AutoencoderKLCogVideoX
from safetensors.numpy import save_file
from shared.decoding import chunks_of
from tpuvid import InputError
from tpuvid.cli.main import run
from tpuvid.family import Runtime
from tpuvid.plugin.lookup import resolve_model
from tpuvid_cogvideox.conformance import RandomCogVideoX
from tpuvid_cogvideox.denoise import CogVideoXDenoiser
from tpuvid_cogvideox.encode import CogVideoXTextEncoder


def test_guidance_off_ignores_the_negative_prompt(pipe):
    config = SMALL | {"guidance_scale": 1.0}
    a, b = (pipe.denoise(pipe.encode("a cat", negative), **config).latents for negative in ("", "moon moon"))
    assert np.array_equal(a, b)
    c = pipe.denoise(pipe.encode("a cat", "moon moon"), **SMALL).latents
    assert not np.array_equal(a, c)


def test_an_even_number_of_latent_frames_decodes_as_in_diffusers(checkpoint, pipe, tmp_path, capsys):
    """5 frames asked for are 2 latent frames, of which the VAE makes 8. The record keeps what was asked, to be run again."""
    video = pipe.generate("a cat", **SMALL | {"num_frames": 5})
    assert video.frames.shape[1] == 8 and video.config.num_frames == 5
    sampling = ["--height", "32", "--width", "48", "--num-frames", "5", "--steps", "1"]
    run(["generate", "--model", str(checkpoint), "--prompt", "a cat", *sampling, "-o", str(tmp_path / "a.mp4")])
    assert "frames: 8; 5 were asked for" in capsys.readouterr().out


@pytest.mark.parametrize("frames", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow), 7])
def test_chunks_come_as_in_diffusers(checkpoint, pipe, frames):
    """The first chunk takes the odd frame, and each reaches the host on its own; nothing pointwise is remembered."""
    torch.manual_seed(0)
    z = torch.randn(1, 4, frames, 3, 5)
    vae = AutoencoderKLCogVideoX.from_pretrained(checkpoint, subfolder="vae")
    with torch.no_grad():
        expected = (vae.decode(z / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).numpy()
    chunks = chunks_of(pipe, z)
    assert [c.shape[1] for c in chunks] == {1: [1], 2: [8], 3: [9], 7: [9, 8, 8]}[frames]
    np.testing.assert_allclose(np.concatenate(chunks, axis=1), expected, atol=1e-4)
    decoder = pipe._opened["decode"]
    _, cache = decoder.programs.get("check", decoder._decode, decoder.params, {}, z.numpy())(decoder.params, {}, z.numpy())
    assert set(cache["mid_block"]["resnet_0"]) == {"conv1", "conv2"}


def test_bfloat16_is_close(checkpoint, pipe):
    half = tpuvid.load(str(checkpoint), dtype="bfloat16")
    conditioning = half.encode("a cat")
    assert conditioning.tensors["prompt_embeds"].dtype == ml_dtypes.bfloat16
    latents = half.denoise(conditioning, **SMALL)
    assert latents.latents.dtype == np.float32
    expected = pipe.denoise(pipe.encode("a cat"), **SMALL)
    assert np.abs(latents.latents - expected.latents).max() < 0.1 * np.abs(expected.latents).max()
    frames = half.decode(expected).frames
    assert frames.dtype == np.float32 and np.abs(frames - pipe.decode(expected).frames).max() < 0.1


def test_inputs_are_refused_before_weights_are_read(checkpoint, tmp_path, forbid_weights):
    """The weights are unreadable here; each error must come first."""
    pipe = tpuvid.load(str(checkpoint))
    conditioning = pipe.encode("a cat")
    latents = pipe.denoise(conditioning, **SMALL)

    forbid_weights()
    pipe.free()

    with pytest.raises(InputError, match="made by wan2.1-t2v-14b, which is another checkpoint"):
        pipe.denoise(replace(conditioning, model_id="wan2.1-t2v-14b", fingerprint=None), **SMALL)
    wide = replace(conditioning, tensors={k: np.zeros((1, 226, 4096), np.float32) for k in conditioning.tensors})
    with pytest.raises(InputError, match=r"takes \[1, L, 24\]"):
        pipe.denoise(wide, **SMALL)
    with pytest.raises(InputError, match="num_frames=8: needs 4n.1 frames up to 161; nearest: 5 and 9"):
        pipe.denoise(conditioning, **SMALL | {"num_frames": 8})
    with pytest.raises(InputError, match=r"takes \[B, 4, f, h, w\]"):
        pipe.decode(replace(latents, tensors={"latents": np.zeros((1, 16, 3, 4, 6), np.float32)}))
    lora = tmp_path / "lora.safetensors"
    save_file({"a": np.zeros(1, np.float32)}, lora)
    with pytest.raises(InputError, match="merges no LoRA files"):
        tpuvid.load(str(checkpoint), lora_path=lora).denoise(conditioning, **SMALL)


@pytest.mark.parametrize(
    "component, change, message",
    [
        ("scheduler/scheduler_config.json", {"_class_name": "HeunDiscreteScheduler"}, "HeunDiscreteScheduler"),
        ("transformer/config.json", {"use_rotary_positional_embeddings": False}, "rotary"),
        ("transformer/config.json", {"sample_width": 4}, "width=48: this checkpoint's rotary table ends at 32"),
    ],
)
def test_checkpoints_that_cannot_run_are_refused(checkpoint, tmp_path, component, change, message):
    folder = tmp_path / "random-cogvideox"
    shutil.copytree(checkpoint, folder)
    path = folder / component
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        tpuvid.load(str(folder)).generate("a cat", **SMALL)


def test_published_tokenizers_are_read(tmp_path):
    """The published checkpoints hold a SentencePiece model and no tokenizer.json."""
    folder = RandomCogVideoX().save(tmp_path / "spm")
    text = tmp_path / "text.txt"
    text.write_text("a red cat runs\na blue dog sleeps on the grass\nthe moon\n" * 20)
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer" / "spiece"), vocab_size=40, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    encoder = CogVideoXTextEncoder(resolve_model(str(folder))[1], Runtime.create())
    stock = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer" / "spiece.model"))
    assert encoder.tokenizer("a red cat").input_ids == [*stock.encode("a red cat"), 1]


def test_denoiser_keeps_the_pipelines_layout(checkpoint, pipe):
    """9 frames are 3 latent frames, padded to 4 for patches of 2; the first one is dropped."""
    denoiser = pipe._opened.get("denoise") or CogVideoXDenoiser(pipe.checkpoint, pipe.runtime)
    assert denoiser._latent_frames(pipe.spec.defaults.override(num_frames=9)) == (4, 1)
    assert denoiser._latent_frames(pipe.spec.defaults.override(num_frames=13)) == (4, 0)
    assert pipe.denoise(pipe.encode("a cat"), **SMALL).latents.shape == (1, 4, 3, 4, 6)
