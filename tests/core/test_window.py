"""Sliding windows: what is visited, what is hidden, and that kernels agree with a mask written out in full."""

import jax.numpy as jnp
import numpy as np
import pytest
from tpuvid.compute.kernels import attention_window, flash, token_attention
from tpuvid.compute.kernels.block_sizes import Blocks
from tpuvid.compute.kernels.flash import attention_flash
from tpuvid.compute.kernels.reference import attention_reference
from tpuvid.compute.kernels.tokens import VIDEO, Stream
from tpuvid.compute.kernels.window import BLOCKS, FORBIDDING, Band, Window, key_columns, query_columns, visits
from tpuvid.compute.kernels.xla import attention_xla_windowed
from tpuvid.contract import WindowSize
from tpuvid.errors import InputError

SMALL = Blocks(256, 256, 128)
BANDS = {
    "frames": (Band(Window(100, 1), 900), 0),
    "frames and text": (Band(Window(100, 1), 900), 40),
    "a run wider than a block": (Band(Window(400, 1), 1600), 30),
    "no other frame": (Band(Window(100, 0), 900), 10),
    "ragged": (Band(Window(128, 2), 1000), 7),
    "the second of three parts": (Band(Window(50, 2), 900, 3, 1), 0),
    "the last of two parts": (Band(Window(128, 2), 900, 2, 1), 40),
}
EVERY_BAND = pytest.mark.parametrize("band, rest", BANDS.values(), ids=BANDS)


def windowed_flash(q, k, v, band, *, kv_mask=None):
    return attention_flash(q, k, v, band=band, kv_mask=kv_mask, blocks=SMALL, interpret=True)


def windowed_xla(q, k, v, band, *, kv_mask=None):
    return attention_xla_windowed(q, k, v, band, kv_mask=kv_mask)


BACKENDS = pytest.mark.parametrize("attend", [windowed_flash, windowed_xla], ids=["flash", "xla"])


def inputs(band, rest, seed=0):
    rng = np.random.default_rng(seed)
    queries, keys = band.places // band.parts, band.places + rest
    return [jnp.asarray(rng.normal(size=(2, 2, n, 64)), jnp.float32) for n in (queries, keys, keys)]


def difference(found, q, k, v, band, kv_mask=None):
    mask = band.mask(q.shape[2], k.shape[2])[None, None]
    expected = attention_reference(q, k, v, mask=mask if kv_mask is None else mask & kv_mask[:, None, None])
    assert np.isfinite(found).all()
    return float(jnp.abs(found - expected).max() / jnp.abs(expected).max())


@BACKENDS
@EVERY_BAND
def test_agrees_with_a_mask_written_out(attend, band, rest):
    q, k, v = inputs(band, rest)
    assert difference(attend(q, k, v, band), q, k, v, band) < 2e-5


@BACKENDS
def test_masked_keys_have_no_say(attend):
    band, rest = BANDS["frames and text"]
    q, k, v = inputs(band, rest)
    kept = jnp.asarray(np.random.default_rng(1).random((2, 940)) < 0.6).at[1, 900:].set(False)
    expected = difference(attend(q, k, v, band, kv_mask=kept), q, k, v, band, kept)
    k, v = (jnp.where(kept[:, None, :, None], x, jnp.nan if attend is windowed_flash else 1e4) for x in (k, v))
    k_, v_ = (jnp.where(kept[:, None, :, None], x, 0) for x in (k, v))
    found = attend(q, k, v, band, kv_mask=kept)
    assert expected < 2e-5 and difference(found, q, k_, v_, band, kept) < 2e-5


@BACKENDS
def test_a_query_that_sees_only_masked_keys_gets_zeros(attend):
    band, rest = BANDS["frames"]
    q, k, v = inputs(band, rest)
    kept = jnp.ones((2, 900), bool).at[:, 300:700].set(False)
    found = attend(q, k, v, band, kv_mask=kept)
    assert not found[:, :, 400:600].any() and found[:, :, 390].any()
    assert difference(found, q, k, v, band, kept) < 2e-5


def test_plain_scores_never_take_the_exact_path(monkeypatch):
    """Also where the first block that is visited hides all of itself from some queries."""
    when = flash.pl.when

    def without_exact(condition):
        return lambda branch: None if "exact" in branch.__code__.co_freevars else when(condition)(branch)

    monkeypatch.setattr(flash.pl, "when", without_exact)
    band, rest = BANDS["no other frame"]
    q, k, v = inputs(band, rest)
    assert difference(windowed_flash(q, k, v, band), q, k, v, band) < 2e-5


@pytest.mark.parametrize("what", ["hidden keys far above", "seen keys far above", "seen keys far below"])
def test_flash_is_exact_whatever_the_scores(what):
    """Softmax's m must come from keys that a query sees."""
    band, rest = BANDS["frames and text"]
    q, k, v = inputs(band, rest)
    mask = band.mask(900, 940)
    q = jnp.abs(q)
    match what:
        case "hidden keys far above":
            k = jnp.where((jnp.arange(940) < 300)[:, None], 30 * jnp.abs(k), k)
        case "seen keys far above":
            k = jnp.where((jnp.arange(940) >= 900)[:, None], 30 * jnp.abs(k), k)
        case "seen keys far below":
            k = -30 * jnp.abs(k)
    assert mask[850, 899] and not mask[850, 100]
    assert difference(windowed_flash(q, k, v, band), q, k, v, band) < 1e-4


def test_flash_where_every_block_takes_the_exact_path(monkeypatch):
    monkeypatch.setattr(flash, "LIMIT", 0.0)
    band, rest = BANDS["ragged"]
    q, k, v = inputs(band, rest)
    assert difference(windowed_flash(q, k, v, band), q, k, v, band) < 2e-5


@EVERY_BAND
def test_what_holds_nothing_that_is_seen_is_not_visited(band, rest):
    queries, keys = band.places // band.parts, band.places + rest
    seen = np.asarray(band.mask(queries, keys))
    table = visits(band._replace(part=0), queries, keys, SMALL)[band.part]
    found = [(i, j) for i, j, *_ in table.T]
    needed = {
        (i, j)
        for i in range(-(-queries // 256))
        for j in range(-(-keys // 256))
        if seen[i * 256 : (i + 1) * 256, j * 256 : (j + 1) * 256].any()
    }
    assert set(found) == needed and len(needed) < -(-queries // 256) * -(-keys // 256)
    for block in range(-(-queries // 256)):
        numbers = dict.fromkeys((number, last) for i, _, number, last in table.T if i == block)
        assert [n for n, _ in numbers] == list(range(len(numbers))) and [last for _, last in numbers][:-1] == [0] * (
            len(numbers) - 1
        ), "numbered in order, to the last"


@pytest.mark.parametrize(
    "window, total",
    [
        (Window.of_frames(2, tokens_per_frame=3600, total=75_600), 75_600),
        (Window.of_frames(8, tokens_per_frame=920, total=325 * 920), 325 * 920),  # more frames than there are columns
        (Window.of_frames(40, tokens_per_frame=8, total=8_000), 8_000),
        (Window.of_tokens(8192, total=75_600), 75_600),
        (Window.of_tokens(30_000, total=500_000), 500_000),
    ],
)
def test_columns_tell_hidden_from_seen_in_all_that_is_visited(window, total):
    """At real sizes, by runs: a run's first token stands for it."""
    places = -(-total // BLOCKS.kv) * BLOCKS.kv
    band, keys = Band(window, places), places + 300
    table = visits(band, total, keys, BLOCKS)[0]
    of_query = np.asarray(query_columns(band, total, jnp.float32))
    of_key = np.asarray(key_columns(band, jnp.ones((1, keys), bool), jnp.float32))[0]
    step = min(window.run, 128)
    for i, j, *_ in table[:, :: max(1, table.shape[1] // 300)].T:
        rows = np.arange(i * BLOCKS.q, min((i + 1) * BLOCKS.q, total), step)
        columns = np.arange(j * BLOCKS.kv, min((j + 1) * BLOCKS.kv, keys), step)
        seen = (np.abs(rows[:, None] // window.run - columns // window.run) <= window.reach) | (columns >= places)
        np.testing.assert_array_equal(of_query[rows] @ of_key[columns].T, np.where(seen, 0, FORBIDDING))


@pytest.mark.parametrize(
    "found, expected",
    [
        (Window.of_frames(2, tokens_per_frame=3600, total=75_600), Window(3600, 2)),
        (Window.of_frames(20, tokens_per_frame=3600, total=75_600), None),
        (Window.of_frames(19, tokens_per_frame=3600, total=75_600), Window(3600, 19)),
        (Window.of_tokens(1000, total=75_600), Window(128, 8)),
        (Window.of_tokens(75_600, total=75_600), None),
    ],
)
def test_windows_in_whole_runs(found, expected):
    assert found == expected


def test_coarse_runs_never_show_less_than_was_asked_for():
    for tokens in (7_000, 9_000, 20_000, 60_000):
        window = Window.of_tokens(tokens, total=300_000)
        assert window.run > 128 and tokens <= window.run * window.reach < tokens + window.run


def test_streams_beside_the_video_see_all_and_are_seen():
    rng = np.random.default_rng(0)
    video, text = (jnp.asarray(rng.normal(size=(3, 1, 2, n, 16)), jnp.float32) for n in (60, 9))
    kept = jnp.arange(9)[None] < 5
    window = Window(10, 1)
    with attention_window(window):
        text_out, video_out = token_attention([Stream("text", *text, kept), Stream(VIDEO, *video)])
    query, key, value = (jnp.concatenate([video[i], text[i]], axis=2) for i in range(3))
    mask = Band(window, 60).mask(69, 69) | (jnp.arange(69) >= 60)[:, None]
    mask &= jnp.concatenate([jnp.ones((1, 60), bool), kept], axis=1)
    expected = attention_reference(query, key, value, mask=mask[None, None])
    np.testing.assert_allclose(jnp.concatenate([video_out, text_out], axis=2), expected, atol=1e-5)


@pytest.mark.parametrize("value, expected", [("16", "frames=16"), (16, "frames=16"), ("tokens=8192", "tokens=8192")])
def test_settings(value, expected):
    assert str(WindowSize.parse(value)) == expected


@pytest.mark.parametrize("scale", [0.0, 1e-5, -0.1])
def test_flash_refuses_scales_with_which_it_could_not_hide(scale):
    with pytest.raises(ValueError, match="scale the queries"):
        attention_flash(*inputs(*BANDS["frames"]), band=BANDS["frames"][0], scale=scale, interpret=True)


@pytest.mark.parametrize("value", ["", "-1", "3.5", "９", "tokens=" + "9" * 5000, "frames", "pixels=3", "frames=", True, 2.0])
def test_settings_that_say_nothing_are_refused(value):
    with pytest.raises(InputError, match="needs a number of frames"):
        WindowSize.parse(value)
