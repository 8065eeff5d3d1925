import json
import math

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from tpuvid import InputError
from tpuvid.cli.main import run
from tpuvid.files.mp4 import save_mp4, to_uint8
from tpuvid.files.stage_files import FRAMES, LATENTS
from tpuvid.runs.compare import compare, render

RNG = np.random.default_rng(0)


def random_frames(frames=3, height=16, width=24):
    return RNG.random((1, frames, height, width, 3), np.float32)


def write(path, **tensors):
    save_file(tensors, path)
    return path


@pytest.fixture
def pair(tmp_path):
    """Writes two frames files."""
    return lambda a, b: (write(tmp_path / "a.safetensors", frames=a), write(tmp_path / "b.safetensors", frames=b))


def test_a_constant_difference_has_a_known_psnr(pair):
    """A tenth of the range everywhere: 20 dB."""
    a = np.full((1, 2, 16, 16, 3), 0.25, np.float32)
    found = compare(*pair(a, a + np.float32(0.1)))
    assert found.kind == "frames" and found.shape == (2, 16, 16, 3) and found.data_range == 1
    assert found.psnr == pytest.approx(20, abs=1e-5) and found.worst_frame_psnr == pytest.approx(20, abs=1e-5)
    assert found.largest_difference == pytest.approx(0.1) and found.mean_difference == pytest.approx(0.1)
    # of two constant pictures SSIM is (2ab + C1) / (a² + b² + C1)
    assert found.ssim == pytest.approx((2 * 0.25 * 0.35 + 1e-4) / (0.25**2 + 0.35**2 + 1e-4), abs=1e-5)


def test_figures_are_scikit_images(pair):
    a, b = random_frames(), random_frames()
    found = compare(*pair(a, b))
    assert found.psnr == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-4)
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1, data_range=1)
    expected = np.mean([structural_similarity(x, y, **options) for x, y in zip(a[0], b[0], strict=True)])
    assert found.ssim == pytest.approx(expected, abs=1e-5)
    assert found.largest_difference == pytest.approx(np.abs(a - b).max())


def test_identical_files_are_said_to_be(pair):
    a = random_frames()
    found = compare(*pair(a, a))
    assert found.identical and math.isinf(found.psnr) and found.ssim == 1 and found.worst_frame is None
    assert "identical" in render(found)
    about = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert about["psnr"] is None and about["identical"] is True


def test_one_faulty_frame_is_located(pair):
    a = random_frames(frames=7) / 2
    b = a.copy()
    b[0, 4, :8] += 0.25
    found = compare(*pair(a, b))
    assert found.worst_frame == 4 and not found.identical
    # half of the frame is off by 1/4; of the video, a fourteenth
    assert found.worst_frame_psnr == pytest.approx(-10 * math.log10(1 / 32), abs=1e-4)
    assert found.psnr == pytest.approx(-10 * math.log10(1 / 16 / 14), abs=1e-4)
    assert "worst in frame 4, 15.05 dB" in render(found)


def test_ssim_needs_eleven_pixels(pair):
    a, b = random_frames(height=10), random_frames(height=10)
    found = compare(*pair(a, b))
    assert found.ssim is None and "SSIM: not defined below 11 pixels" in render(found)
    assert compare(*pair(random_frames(height=11), random_frames(height=11))).ssim is not None


def test_an_mp4_is_compared_with_its_frames(tmp_path):
    t, y, x = np.meshgrid(np.arange(9) / 9, np.arange(48) / 48, np.arange(80) / 80, indexing="ij")
    frames = np.stack([x, y, t], axis=-1).astype(np.float32)
    save_mp4(frames, tmp_path / "clip.mp4", fps=8)
    found = compare(write(tmp_path / "frames.safetensors", frames=frames[None]), tmp_path / "clip.mp4")
    assert found.kind == "frames" and found.shape == (9, 48, 80, 3)
    assert found.psnr > 35 and 0.9 < found.ssim < 1
    assert compare(tmp_path / "clip.mp4", tmp_path / "clip.mp4").identical


def test_latents_are_measured_by_the_references_range(tmp_path):
    a = RNG.standard_normal((1, 4, 3, 12, 14)).astype(np.float32)
    b = a + np.float32(0.01) * RNG.standard_normal(a.shape).astype(np.float32)
    found = compare(write(tmp_path / "a.safetensors", latents=a), write(tmp_path / "b.safetensors", latents=b))
    assert found.kind == "latents" and found.shape == (3, 12, 14, 4)
    assert found.data_range == pytest.approx(a.max() - a.min())
    assert found.psnr == pytest.approx(peak_signal_noise_ratio(a, b, data_range=a.max() - a.min()), abs=1e-3)
    assert found.ssim is not None


def test_bfloat16_is_read(tmp_path):
    latents, frames = RNG.standard_normal((1, 4, 3, 4, 5)).astype(ml_dtypes.bfloat16), random_frames()
    for name, value in (("latents", latents), ("frames", frames.astype(ml_dtypes.bfloat16))):
        a = write(tmp_path / "a.safetensors", **{name: value})
        assert not compare(a, write(tmp_path / "b.safetensors", **{name: value[..., ::-1].copy()})).identical
        assert compare(a, a).identical


def test_of_a_folder_the_frames_are_taken_then_the_mp4_then_the_latents(tmp_path):
    with pytest.raises(InputError, match="holds neither"):
        compare(tmp_path, tmp_path)
    write(tmp_path / LATENTS, latents=RNG.standard_normal((1, 4, 3, 4, 5)).astype(np.float32))
    assert compare(tmp_path, tmp_path).a == str(tmp_path / LATENTS)
    frames = random_frames()
    video = save_mp4(frames[0], tmp_path / "output_video.mp4", fps=8)
    assert compare(tmp_path, tmp_path).a == str(video)
    other = save_mp4(frames[0], tmp_path / "other.mp4", fps=8)
    with pytest.raises(InputError, match=r"holds 2 videos \(other.mp4, output_video.mp4"):
        compare(tmp_path, video)
    write(tmp_path / FRAMES, frames=frames)
    found = compare(tmp_path, other)
    assert found.a == str(tmp_path / FRAMES) and f"A: {tmp_path / FRAMES} (the reference)" in render(found)


def test_what_cannot_be_compared_is_refused(tmp_path):
    frames, latents = random_frames(), RNG.standard_normal((1, 4, 3, 4, 5)).astype(np.float32)
    good = write(tmp_path / "good.safetensors", frames=frames)
    stored = write(tmp_path / "latents.safetensors", latents=latents)
    bad = tmp_path / "bad.safetensors"

    def refused(message, a=good, b=bad, **tensors):
        if tensors:
            write(bad, **tensors)
        with pytest.raises(InputError, match=message):
            compare(a, b)

    refused("good.safetensors holds frames, .*latents.safetensors holds latents; .*tpuvid decode", b=stored)
    refused(r"good.* is \[3, 16, 24, 3\], .*bad.* is \[3, 16, 16, 3\]", frames=random_frames(width=16))
    refused(r"good.* is \[3, 16, 24, 3\], .*bad.* is \[5, 16, 24, 3\]", frames=random_frames(frames=5))
    refused(r"frames are F32 \[1, 0, 16, 24, 3\]", frames=random_frames()[:, :0])
    refused("holds x, neither frames nor latents", x=frames)
    refused("frames are U8", frames=to_uint8(frames))
    refused(r"frames are F32 \[3, 16, 24, 3\]", frames=frames[0])
    refused("holds 2 videos", frames=np.concatenate([frames, frames]))
    refused("reach from 0.* to 25.*, not within", frames=frames * 255)
    refused("holds NaN", frames=frames * np.float32("nan"))
    refused("holds NaN", a=stored, latents=latents * np.float32("inf"))
    refused(r"is \[3, 4, 5, 4\], .*is \[3, 4, 4, 4\]", a=stored, latents=latents[..., :4].copy())
    refused("all latents are 0", a=bad, b=stored, latents=latents * 0)
    refused("not .B, C, f, h, w.", a=stored, latents=latents[0])
    refused("neither an .mp4 nor", b=write(tmp_path / "clip.avi", frames=frames))
    refused("does not exist", b=tmp_path / "nothing.mp4")
    bad.write_bytes(good.read_bytes()[:-20])
    refused("truncated or foreign")


@pytest.mark.parametrize("part", [0, 0.02, 0.5, 0.99])
def test_a_truncated_mp4_is_refused(tmp_path, part, capsys):
    frames = random_frames(frames=20)
    path = write(tmp_path / "frames.safetensors", frames=frames)
    whole = save_mp4(frames[0], tmp_path / "clip.mp4", fps=8).read_bytes()
    (tmp_path / "clip.mp4").write_bytes(whole[: int(len(whole) * part)])
    assert run(["compare", str(path), str(tmp_path / "clip.mp4")]) == 2
    err = capsys.readouterr().err
    assert "clip.mp4: " in err and "truncated or no" in err and err.count("\n") == 1


def test_the_command(tmp_path, capsys):
    a, b = random_frames(), random_frames()
    paths = [str(write(tmp_path / f"{name}.safetensors", frames=value)) for name, value in (("a", a), ("b", b))]
    assert run(["compare", *paths]) == 0
    out = capsys.readouterr().out
    for line in ("frames [3, 16, 24, 3]", "PSNR: ", "SSIM: ", "difference: largest "):
        assert line in out
    assert run(["compare", *paths, "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["shape"] == [3, 16, 24, 3] and about["psnr"] == pytest.approx(compare(*paths).psnr)
    assert run(["compare", paths[0], paths[0], "--json"]) == 0
    assert "Infinity" not in (text := capsys.readouterr().out) and json.loads(text)["identical"] is True
