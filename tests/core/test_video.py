import os
import resource

import av
import numpy as np
import pytest
from PIL import Image
from tpuvid.errors import InputError, TpuvidError
from tpuvid.files.colours import to_rgb
from tpuvid.files.mp4 import save_mp4, to_uint8
from tpuvid.files.sheet import save_contact_sheet


def clip(frames=9, height=48, width=80):
    """A smooth moving gradient: what H.264 keeps well."""
    t, y, x = np.meshgrid(np.arange(frames) / frames, np.arange(height) / height, np.arange(width) / width, indexing="ij")
    return np.stack([x, y, t], axis=-1).astype(np.float32)


def test_mp4_plays_back_what_was_written(tmp_path):
    frames = clip()
    path = save_mp4(frames, tmp_path / "new" / "clip.mp4", fps=12)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == 12
        decoded = np.stack([to_rgb(frame) for frame in container.decode(stream)])
    assert decoded.shape == frames.shape
    mse = np.mean((decoded / 255 - frames) ** 2)
    assert -10 * np.log10(mse) > 35


COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (128, 128, 128), "skin": (224, 172, 105)}


def of_one_colour(name, height, width):
    return np.broadcast_to(np.array(COLOURS[name], np.float32) / 255, (2, height, width, 3))


@pytest.mark.parametrize("height, width", [(64, 64), (720, 1280)])
@pytest.mark.parametrize("name, luma", [("red", 63), ("green", 173), ("blue", 32), ("grey", 126), ("skin", 169)])
def test_colours_are_bt709_and_say_so(tmp_path, name, luma, height, width):
    """Whatever the size; in the pictures and in the container, also after the record was put into it."""
    path = save_mp4(of_one_colour(name, height, width), tmp_path / "clip.mp4", fps=8, metadata={"prompt": name})
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.color_range, context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1, 1)
        frame = next(container.decode(video=0))
    assert int(frame.colorspace) == 1 and frame.to_ndarray()[height // 2, width // 2] == luma  # Y, by ITU-R BT.709-6
    assert np.abs(to_rgb(frame).astype(int) - COLOURS[name]).max() <= 1
    assert b"colrnclx" + bytes([0, 1, 0, 1, 0, 1, 0]) in path.read_bytes(), "BT.709 three times, limited range"


@pytest.mark.parametrize("height, matrix", [(64, "ITU601"), (720, "ITU709")])
def test_what_says_nothing_of_its_colours_is_read_as_players_do(height, matrix):
    red = av.VideoFrame.from_ndarray(np.full((height, 64, 3), (255, 0, 0), np.uint8), format="rgb24")
    silent = red.reformat(format="yuv420p", dst_colorspace=matrix, src_color_range="JPEG", dst_color_range="MPEG")
    silent.colorspace, silent.color_range = 2, 0
    assert np.abs(to_rgb(silent)[height // 2, 32].astype(int) - (255, 0, 0)).max() <= 2


def test_mp4_starts_before_it_is_fetched_whole(tmp_path):
    data = save_mp4(clip(), tmp_path / "clip.mp4", fps=8).read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_one_frame_is_a_video(tmp_path):
    save_mp4(clip(frames=1), tmp_path / "clip.mp4", fps=8)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert len(list(container.decode(video=0))) == 1


def test_existing_video_is_kept(tmp_path):
    (tmp_path / "clip.mp4").write_text("old")
    with pytest.raises(InputError, match="--overwrite"):
        save_mp4(clip(), tmp_path / "clip.mp4", fps=8)
    assert (tmp_path / "clip.mp4").read_text() == "old"
    save_mp4(clip(), tmp_path / "clip.mp4", fps=8, overwrite=True)


def test_only_mp4_names(tmp_path):
    with pytest.raises(InputError, match="give a name that ends so"):
        save_mp4(clip(), tmp_path / "clip.png", fps=8)


def test_uint8_rounds():
    assert to_uint8(np.array([-0.1, 0.0, 0.499 / 255, 0.501 / 255, 1.0, 1.5])).tolist() == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize("count, tiles", [(1, 1), (5, 5), (17, 12), (100, 12)])
def test_contact_sheet_shows_first_to_last(tmp_path, count, tiles):
    frames = np.zeros((count, 64, 64, 3), np.float32)
    frames[..., 0] = (np.arange(count) / max(count - 1, 1))[:, None, None]
    sheet = np.asarray(Image.open(save_contact_sheet(frames, tmp_path / "sheet.png")))
    zoom, gap = 3, 4
    columns = min(6, tiles)
    first = sheet[gap + 10, gap + 10]
    row, column = divmod(tiles - 1, columns)
    last = sheet[gap + row * (64 * zoom + gap) + 10, gap + column * (64 * zoom + gap) + 10]
    assert first[0] == 0 and (last[0] == 255 or count == 1)
    assert sheet.shape[1] == columns * (64 * zoom + gap) + gap


def test_a_full_disk_leaves_no_video(tmp_path):
    """A file-size limit stands in for the disk."""
    noise = np.random.default_rng(0).random((30, 64, 64, 3)).astype(np.float32)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(TpuvidError, match="clip.mp4: can't be written .*; free space or choose another place"):
            save_mp4(noise, tmp_path / "clip.mp4", fps=8)
        with pytest.raises(TpuvidError, match="sheet.png: can't be written"):
            save_contact_sheet(noise, tmp_path / "sheet.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


def test_the_same_frames_give_the_same_file(tmp_path):
    """With x264's defaults, one in ten of these differs."""
    rows, columns = np.mgrid[:64, :64]
    frames = 0.1 * np.random.default_rng(0).random((17, 64, 64, 3), np.float32)
    for i, frame in enumerate(frames):
        frame[..., 0] += 0.8 * ((columns - 10 - 2 * i) ** 2 + (rows - 30) ** 2 < 80)
    files = {save_mp4(frames, tmp_path / "clip.mp4", fps=8, overwrite=True).read_bytes() for _ in range(60)}
    assert len(files) == 1
