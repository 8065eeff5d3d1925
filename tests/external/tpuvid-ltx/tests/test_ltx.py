"""What a user of tpuvid-ltx relies on. Needs no network: the checkpoint is a small random one."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tpuvid
from tpuvid import testing
from tpuvid.contract import Conditioning
from tpuvid.errors import InputError
from tpuvid_ltx.conformance import random_checkpoint, reference
from tpuvid_ltx.plugin import LTX_VIDEO, SMALL

PROMPT, NEGATIVE_PROMPT = "a red cat on the moon", "blurry"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ltx") / "random"
    random_checkpoint(folder)
    return folder


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_it_conforms():
    (sheet,) = testing.check("tpuvid-ltx")
    assert sheet.passed, sheet.render()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(guidance_scale=1.0, num_inference_steps=6, fps=12, height=96, width=64),
        dict(num_frames=1, max_sequence_length=15),
    ],
    ids=["guidance", "no guidance, 12 fps", "one frame, a prompt cut off"],
)
def test_every_stage_agrees_with_stock_diffusers(checkpoint, changes):
    config = LTX_VIDEO.configure(prompt=PROMPT, negative_prompt=NEGATIVE_PROMPT, **SMALL | changes)
    expected = reference(checkpoint, config)
    pipe = tpuvid.load(str(checkpoint), dtype="float32")
    conditioning = pipe.encode_config(config, negative=config.do_classifier_free_guidance)
    latents = pipe.denoise_config(conditioning, config)
    found = dict(conditioning.tensors) | {"latents": latents.latents, "frames": pipe.decode(latents).frames}
    assert {name: relative(found[name], value) for name, value in expected.items() if relative(found[name], value) > 1e-4} == {}


def test_tiles_are_those_of_stock_diffusers(checkpoint):
    import torch
    from diffusers import AutoencoderKLLTXVideo
    from tpuvid.contract import Latents

    pipe = tpuvid.load(str(checkpoint), dtype="float32", vae_tiling=True)
    latents = np.random.default_rng(0).standard_normal((1, 8, 2, 18, 17), np.float32)  # tiles of 16 that begin every 14
    config = pipe.spec.configure(**SMALL | dict(height=576, width=544, num_frames=9))
    found = pipe.decode(Latents(model_id=pipe.spec.model_id, tensors={"latents": latents}, config=config)).frames
    vae = AutoencoderKLLTXVideo.from_pretrained(checkpoint / "vae")
    vae.enable_tiling()
    z = torch.from_numpy(pipe._open("decode").denormalise(latents))
    with torch.no_grad():
        expected = (vae.decode(z).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1).numpy()
    assert relative(found, expected) <= 1e-4


@cache
def _embeds(checkpoint: Path) -> Conditioning:
    return tpuvid.load(str(checkpoint)).encode(PROMPT, NEGATIVE_PROMPT, max_sequence_length=20)


@pytest.mark.parametrize(
    "name, change",
    [
        ("prompt_embeds", lambda x: x[..., 1:]),
        ("prompt_attention_mask", lambda x: x[:, 1:]),
        ("prompt_attention_mask", lambda x: x * 2),
        ("negative_prompt_attention_mask", lambda x: x * 0),
        ("negative_prompt_attention_mask", None),
    ],
)
def test_conditioning_of_another_model_is_refused_before_weights_are_read(checkpoint, monkeypatch, name, change):
    made = _embeds(checkpoint)
    tensors = {k: (change(v) if k == name else v) for k, v in made.tensors.items() if k != name or change}
    from tpuvid.family import Weights

    monkeypatch.setattr(Weights, "read", lambda *_: pytest.fail("weights were read"))
    wrong = Conditioning(**{f: getattr(made, f) for f in made.__dataclass_fields__} | {"tensors": tensors})
    with pytest.raises(InputError, match=name):
        tpuvid.load(str(checkpoint)).denoise(wrong, num_inference_steps=2, height=64, width=64, num_frames=9)


def test_a_single_step_is_refused_as_the_scheduler_gives_none(checkpoint):
    with pytest.raises(InputError, match="num_inference_steps=1"):
        tpuvid.load(str(checkpoint)).generate(PROMPT, **SMALL | {"num_inference_steps": 1})
