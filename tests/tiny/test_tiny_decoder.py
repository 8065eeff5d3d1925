"""wan-tiny's preview decoder: near the VAE's, through every door that a decoder of another package goes through."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tpuvid
import tpuvid_tiny
from safetensors.torch import load_file
from shared.mesh_parity import strips_on_eight_devices
from tpuvid.cli.main import run
from tpuvid.contract import Latents
from tpuvid.errors import InputError
from tpuvid.runs.preview import Preview
from tpuvid_tiny.decode import PreviewNetwork

PACKAGE = Path(tpuvid_tiny.__file__).parent
FOLDER = PACKAGE / "decoders" / "preview"
LARGEST = 400_000  # bytes
FLOOR = 30.0
"""dB: the demo's clip has 34.5 (2026-11-22), and 29.1 is what the VAE's own frames have, one frame late."""
PROMPT = "a red circle moving right on a black background"
SHORT = ("--num-frames", "5", "--steps", "2")


@pytest.fixture(scope="module")
def preview():
    return tpuvid.load("wan-tiny", decoder="preview")


@pytest.fixture(scope="module")
def latents(preview) -> Latents:
    """The latents of the demo's clip."""
    return preview.denoise(preview.encode(PROMPT))


def noise(preview, *shape: int) -> Latents:
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    return Latents(model_id="wan-tiny", tensors={"latents": values}, config=preview.spec.defaults)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.square(a - b).mean()))


def test_is_small_and_safe():
    files = list(FOLDER.iterdir())
    assert {file.name for file in files} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert sum(file.stat().st_size for file in files) < LARGEST
    vae, own = (json.loads((folder / "config.json").read_text()) for folder in (PACKAGE / "checkpoint" / "vae", FOLDER))
    assert all(own[name] == vae[name] for name in ("latents_mean", "latents_std"))


def test_draws_what_the_vae_draws(preview, latents):
    own, found = (pipe.decode(latents).frames for pipe in (tpuvid.load("wan-tiny"), preview))
    assert found.shape == own.shape == (1, 17, 64, 64, 3)
    assert psnr(found, own) > FLOOR
    assert psnr(own[:, 1:], own[:, :-1]) < FLOOR, "a floor that frames out of place reach too tells nothing"


@pytest.mark.parametrize("frames", [1, 2, 4, 10])
def test_is_its_network(preview, frames):
    """Chunk by chunk, for a batch, as torch runs it: one chunk, three of the same size, and none but the first frame."""
    network = PreviewNetwork(json.loads((FOLDER / "config.json").read_text()))
    network.load_state_dict(load_file(FOLDER / "diffusion_pytorch_model.safetensors"))
    made = noise(preview, 2, 16, frames, 6, 10)
    z = torch.from_numpy(preview._open("decode").denormalise(made.latents))
    with torch.no_grad():
        drawn = [network.first_frame(z[:, :, 0])]
        drawn += [network.further_frames(z[:, :, 0], z[:, :, i - 1], z[:, :, i]) for i in range(1, frames)]
    expected = (torch.cat(drawn, dim=2) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).numpy()
    found = preview.decode(made).frames
    assert found.shape == expected.shape == (2, 4 * frames - 3, 48, 80, 3)
    assert np.abs(found - expected).max() <= 1e-5


def test_reads_nothing_of_the_vae(preview, latents, tmp_path):
    shutil.copytree(PACKAGE / "checkpoint", tmp_path / "wan", ignore=shutil.ignore_patterns("vae"))
    pipe = tpuvid.load(tmp_path / "wan", decoder="preview")
    pipe.verify()
    made = replace(latents, fingerprint=None)  # of a copy without a VAE it is another
    assert np.array_equal(pipe.decode(made).frames, preview.decode(latents).frames)
    with pytest.raises(InputError, match="vae"):
        tpuvid.load(tmp_path / "wan").verify()


def test_staged_or_not_and_again(tmp_path, capsys):
    """What `generate` makes, the three stages make, and `reproduce`; and the stage file serves both decoders."""
    preview = ("--decoder", "preview")
    clip, stages = tmp_path / "clip.mp4", tmp_path / "stages"
    assert run(["generate", "--model", "wan-tiny", "--prompt", PROMPT, *SHORT, *preview, "-o", str(clip)]) == 0
    assert run(["encode", "--model", "wan-tiny", "--prompt", PROMPT, "--output-dir", str(stages)]) == 0
    assert run(["denoise", "--input-dir", str(stages), *SHORT]) == 0
    records = [json.loads(clip.with_suffix(".json").read_text())]
    for name, decoder in {"preview": preview, "own": ()}.items():
        folder = tmp_path / name
        assert run(["decode", "--input-dir", str(stages), "--output-dir", str(folder), *decoder]) == 0
        (beside,) = folder.glob("*.json")
        records.append(json.loads(beside.read_text()))
    assert [record["options"]["decoder"] for record in records] == ["preview", "preview", None]
    one_shot, staged, own = (record["frames_sha256"] for record in records)
    assert staged == one_shot != own
    assert len({record["latents_sha256"] for record in records}) == 1
    capsys.readouterr()
    assert run(["reproduce", str(clip), "-o", str(tmp_path / "again.mp4"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["same_latents"] and found["same_frames"] and not found["differences"]


def test_unknown_decoders_are_refused_first(latents, tmp_path, capsys, forbid_weights):
    forbid_weights()
    command = ["generate", "--prompt", PROMPT, "-o", str(tmp_path / "clip.mp4")]
    assert run([*command, "--model", "wan-tiny", "--decoder", "taehv"]) == 2
    assert "decoder='taehv'" in (said := capsys.readouterr().err) and "choose preview" in said
    assert run([*command, "--model", "wan2.1-t2v-1.3b", "--decoder", "preview"]) == 2
    assert "none but its own" in capsys.readouterr().err
    with pytest.raises(InputError, match="choose preview"):
        tpuvid.load("wan-tiny", decoder="taehv")


def test_strips_on_eight_devices_agree_with_one():
    """Eight strips by height, and seven by width, of which the last is half empty."""
    found = strips_on_eight_devices("wan-tiny", "preview")
    assert [strips["parts"] for strips in found.values()] == [8, 7]
    assert all(strips["error"] <= 1e-5 for strips in found.values())


def test_tiles(preview):
    """Where a tile has the picture to itself, it is the whole picture's, up to what its network sees beyond its end."""
    made = noise(preview, 1, 16, 2, 40, 4)
    whole, tiled = (pipe.decode(made).frames for pipe in (preview, tpuvid.load("wan-tiny", decoder="preview", vae_tiling=True)))
    assert whole.shape == tiled.shape == (1, 5, 320, 32, 3)
    assert np.abs(whole - tiled)[:, :, :192].max() <= 1e-5 < np.abs(whole - tiled).max()


def test_the_packages_map_is_there_at_once(latents, tmp_path, monkeypatch):
    """Nothing is fitted: neither the VAE that encodes nor the cache is touched. Each latent frame has a picture."""
    monkeypatch.setenv("TPUVID_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("tpuvid.runs.preview._fitted", lambda *_: pytest.fail("it was fitted"))
    whole = tpuvid.load("wan-tiny")
    found = Preview.of(whole.spec, whole.checkpoint, whole._open("decode"), tmp_path / "run.png")
    drawn = found.pictures(latents.latents[0])
    assert drawn.shape == (5, 8, 8, 3) and np.isfinite(drawn).all() and drawn.std() > 0.05
    assert found.weights.shape == (2, 17, 3) and not (tmp_path / "cache" / "preview").exists()


def test_pictures_of_a_run_still_come(preview, latents, tmp_path, monkeypatch):
    """`--preview` fits its map with the VAE that encodes, whichever decodes."""
    monkeypatch.setenv("TPUVID_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("tpuvid.runs.preview.CLIPS", 1)
    Preview.fit(preview.checkpoint, preview._open("decode"), tmp_path / "run.png").show(latents.latents)
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
