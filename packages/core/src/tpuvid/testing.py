"""Checks that any model package runs in its own tests, on a CPU with a small checkpoint.

    from tpuvid import testing

    def test_conformance(tmp_path):
        testing.check_spec("mymodel")
        testing.check_model("path/to/tiny-checkpoint", tmp_path, height=32, width=32, num_frames=5, num_inference_steps=2)

Each check raises AssertionError with what is wrong.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import tpuvid
from tpuvid.artifacts import load_conditioning, load_latents, save_conditioning, save_latents
from tpuvid.errors import InputError
from tpuvid.registry import registry
from tpuvid.stages import Latents

PROMPT, NEGATIVE_PROMPT = "a red cat on the moon", "blurry"
HEAVY = ("jax", "torch", "torchax", "diffusers", "transformers")


def check_spec(model_id: str) -> None:
    """The registered spec is complete, obeys its own rules, names loaders that exist, and imports nothing heavy."""
    spec = registry().get(model_id)
    config = spec.configure(prompt=PROMPT)
    for stage in ("text_encoder", "denoiser", "decoder"):
        module, _, name = getattr(spec, f"load_{stage}").partition(":")
        assert callable(getattr(importlib.import_module(module), name, None)), f"load_{stage}: {module}:{name} does not exist"
    assert set(spec.components) == {"encode", "denoise", "decode"}, (
        f"components of {sorted(spec.components)}, not of the three stages"
    )
    for field, wrong in (
        ("num_frames", 0),
        ("height", config.height + 1),
        ("num_inference_steps", 0),
        ("guidance_scale", float("nan")),
    ):
        try:
            spec.configure(prompt=PROMPT, **{field: wrong})
        except InputError as error:
            assert f"{field}={wrong}" in str(error), f"the error for {field}={wrong} does not say the value: {error}"
        else:
            raise AssertionError(f"{field}={wrong} was accepted")
    check_imports(spec.model_id)


def check_imports(model_id: str) -> None:
    """Looking the model up in a fresh interpreter imports neither jax nor torch."""
    script = f"import sys; from tpuvid.registry import registry; registry().get({model_id!r}); print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", f"the plugin imports {done.stdout.strip()}"


def check_model(model: str, folder: Path, **settings: Any) -> None:
    """Shapes of every stage, the same result twice, and stages through files in `folder` equal to one shot, bit for bit.

    `settings` as for `Pipeline.generate`; small ones, since everything runs four times.
    """
    pipe = tpuvid.load(model)
    whole = pipe.generate(PROMPT, negative_prompt=NEGATIVE_PROMPT, **settings)
    config = whole.config
    assert whole.frames.shape == (1, config.num_frames, config.height, config.width, 3), f"frames {whole.frames.shape}"
    assert whole.frames.dtype == np.float32 and 0 <= whole.frames.min() and whole.frames.max() <= 1, (
        "frames are not float32 in [0, 1]"
    )
    assert whole.frames.std() > 0, "every pixel is the same"
    again = pipe.generate(PROMPT, negative_prompt=NEGATIVE_PROMPT, **settings)
    assert np.array_equal(again.frames, whole.frames), "the same seed gave another video"
    other = pipe.generate(PROMPT, negative_prompt=NEGATIVE_PROMPT, **settings | {"seed": config.seed + 1})
    assert not np.array_equal(other.frames, whole.frames), "another seed gave the same video"
    _check_staged(model, folder, whole, settings)


def _check_staged(model: str, folder: Path, whole: Any, settings: dict[str, Any]) -> None:
    """Each stage in a pipeline of its own, with nothing between them but files."""
    path = save_conditioning(folder, tpuvid.load(model).encode(PROMPT, NEGATIVE_PROMPT), overwrite=False)
    conditioning = load_conditioning(path)
    for name, embeds in conditioning.tensors.items():
        assert embeds.shape[0] == 1, f"{name} has shape {embeds.shape}, not [1, …]"
    path = save_latents(folder, tpuvid.load(model).denoise(conditioning, **settings), overwrite=False)
    array, file = load_latents(path)
    assert array.ndim == 5 and array.dtype == np.float32, f"latents are {array.dtype} {array.shape}"
    pipe = tpuvid.load(model)
    config = pipe.spec.defaults.override(**file.settings)
    latents = Latents(model_id=file.model_id, latents=array, config=config, fingerprint=file.fingerprint)
    video = pipe.decode(latents)
    assert video.config == whole.config, f"settings changed on the way: {video.config} and {whole.config}"
    assert np.array_equal(video.frames, whole.frames), "staged and one-shot videos differ"
