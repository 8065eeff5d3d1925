import jax.numpy as jnp
import numpy as np
import pytest
from tpuvid.compute.kernels import attention, placed_on
from tpuvid.compute.kernels import flash as flash_kernel
from tpuvid.compute.kernels.attention import _choose
from tpuvid.compute.kernels.block_sizes import Blocks
from tpuvid.compute.kernels.flash import attention_flash
from tpuvid.compute.kernels.placement import Placement
from tpuvid.compute.kernels.reference import attention_reference
from tpuvid.compute.kernels.splash import attention_splash
from tpuvid.compute.kernels.window import Band, Window
from tpuvid.compute.kernels.xla import attention_xla
from tpuvid.compute.mesh import make_mesh
from tpuvid.contract import MeshConfig

# (queries, keys, head dim): blocks and lanes divide some of them, most not
SHAPES = [(128, 128, 128), (1, 1, 8), (75, 301, 64), (300, 77, 40), (257, 513, 128)]


def inputs(queries, keys, dim, *, batch=2, heads=3, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = [(batch, heads, queries, dim), (batch, heads, keys, dim), (batch, heads, keys, dim)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def key_mask(keys, batch=2, seed=1):
    """Random, with one batch entry fully masked."""
    mask = np.random.default_rng(seed).random((batch, keys)) < 0.7
    mask[:, 0] = True
    mask[-1] = False
    return jnp.asarray(mask)


def error(found, expected):
    return float(jnp.abs(found.astype(jnp.float32) - expected.astype(jnp.float32)).max() / jnp.abs(expected).max())


def splash(q, k, v, *, mask=None, scale=None):
    return attention_splash(q, k, v, kv_mask=None if mask is None else mask[:, 0, 0], scale=scale, interpret=True)


def flash(q, k, v, *, mask=None, scale=None, **options):
    """In blocks so small that most shapes have several, the last ones ragged."""
    options.setdefault("blocks", Blocks(256, 256, 128))
    return attention_flash(q, k, v, kv_mask=None if mask is None else mask[:, 0, 0], scale=scale, interpret=True, **options)


BACKENDS = pytest.mark.parametrize("backend", [attention_xla, splash, flash], ids=["xla", "splash", "flash"])


@BACKENDS
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_oracle(backend, shape, masked):
    q, k, v = inputs(*shape)
    mask = key_mask(shape[1])[:, None, None] if masked else None
    expected = attention_reference(q, k, v, mask=mask, scale=0.2)
    found = backend(q, k, v, mask=mask, scale=0.2)
    assert np.isfinite(found).all()
    assert error(found, expected) < 2e-5  # float32, another order of summation


@pytest.mark.parametrize("backend", [splash, flash])
def test_padding_keys_take_no_weight(backend):
    """Zero keys that are merely padded would enter the softmax with weight e⁰: here each real score is far below that."""
    q, k, v = inputs(16, 100, 64)
    q, k = 9 * jnp.abs(q), -9 * jnp.abs(k)
    assert error(backend(q, k, v), attention_reference(q, k, v)) < 1e-4


def softmax_in_float64(q, k, v, scale):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = q @ k.swapaxes(2, 3) * scale
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p @ v / p.sum(-1, keepdims=True)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("spread", [1, 4], ids=["flat", "sharp"])
def test_flash_in_bfloat16_is_as_exact_as_its_weights(dim, spread):
    q, k, v = inputs(300, 1500, dim, batch=1, heads=2, dtype=jnp.bfloat16)
    found = np.asarray(flash(q * spread, k, v, out_dtype=jnp.float32), np.float64)
    expected = softmax_in_float64(q * spread, k, v, dim**-0.5)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 2e-3


def adversarial(name):
    """Inputs [1, 2, 300 or 900, 64] on which a careless maximum fails."""
    q, k, v = inputs(300, 900, 64, batch=1, heads=2)
    match name:
        case "a late key far above all others":
            k = k.at[:, :, 700].set(40 * q[:, :, 5])
        case "higher and higher":
            k = k + jnp.linspace(0, 60, 900)[:, None]
            q = jnp.abs(q)
        case "constant keys":
            k = jnp.ones_like(k) * 30
        case "outlier channels":
            q, k = q.at[..., 3].mul(100), k.at[..., 3].mul(100)
        case "far below zero":
            q, k = 10 * jnp.abs(q), -10 * jnp.abs(k)
        case "the first keys far above all others":
            k = k.at[:, :, :100].mul(60)
        case "large values":
            v = v * 1e30
        case "large values of late keys":
            v, k = v * 1e30, k.at[:, :, 600:].add(8 * q[:, :, :1])
    return q, k, v


@pytest.mark.parametrize(
    "name",
    [
        "a late key far above all others", "higher and higher", "constant keys", "outlier channels", "far below zero",
        "the first keys far above all others", "large values", "large values of late keys",
    ],
)  # fmt: skip
@pytest.mark.parametrize("masked", [False, True])
def test_flash_is_exact_whatever_the_scores(name, masked):
    q, k, v = adversarial(name)
    mask = key_mask(900, 2)[:1, None, None].at[..., 701:].set(False) if masked else None
    found = flash(q, k, v, mask=mask)
    assert np.isfinite(found).all()
    assert error(found, attention_reference(q, k, v, mask=mask)) < 1e-4


def test_flash_where_every_block_takes_the_exact_path(monkeypatch):
    monkeypatch.setattr(flash_kernel, "LIMIT", 0.0)
    q, k, v = inputs(300, 900, 64, batch=1, heads=2)
    assert error(flash(q, k, v), attention_reference(q, k, v)) < 2e-5


@pytest.mark.parametrize("masked", [False, True])
def test_smoothed_keys_give_the_same(masked):
    q, k, v = inputs(300, 900, 64, batch=2, heads=2)
    k = k + 20 * jnp.arange(64)
    mask = key_mask(900)[:, None, None] if masked else None
    k_ = k if mask is None else jnp.where(mask[:, 0, 0, :, None][:, None], k, 1e5)
    found = flash(q, k_, v, mask=mask, smooth_k=True)
    assert np.isfinite(found).all() and error(found, attention_reference(q, k, v, mask=mask)) < 1e-3  # scores of thousands


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("keys", ["normal", "with outlier channels", "with a common offset"])
def test_int8_is_as_exact_as_eight_bits(dim, keys):
    q, k, v = inputs(300, 1500, dim, batch=1, heads=2, dtype=jnp.bfloat16)
    match keys:
        case "with outlier channels":
            k = k.at[..., :3].mul(20)
        case "with a common offset":
            k = k + 10 * jnp.sin(jnp.arange(dim)).astype(k.dtype)
    expected = softmax_in_float64(q, k, v, dim**-0.5)
    found = [
        np.asarray(flash(q, k, v, out_dtype=jnp.float32, int8=True, smooth_k=smooth), np.float64) for smooth in (True, False)
    ]
    smoothed, plain = (np.linalg.norm(x - expected) / np.linalg.norm(expected) for x in found)
    print(f"relative error {smoothed:.1e}, without smoothing {plain:.1e}")
    assert 2e-3 < smoothed < (0.1 if keys == "with outlier channels" else 0.02)
    assert keys != "with a common offset" or smoothed < plain / 2


def test_int8_with_masked_and_ragged_keys():
    q, k, v = inputs(75, 301, 64)
    mask = key_mask(301)[:, None, None]
    expected = attention_reference(q, k, v, mask=mask)
    found = flash(q, jnp.where(mask[:, 0, 0, :, None][:, None], k, 1e4), v, mask=mask, int8=True, smooth_k=True)
    assert error(found, expected) < 0.05 and not found[-1].any(), "the last batch entry has no key"


def test_int8_takes_no_window():
    q, k, v = inputs(40, 40, 64)
    with pytest.raises(ValueError, match="no windows"):
        flash(q, k, v, int8=True, band=Band(Window(10, 1), 40))


def test_nothing_in_keys_that_are_all_masked_matters():
    q, k, v = inputs(40, 300, 64)
    mask = jnp.zeros((2, 1, 1, 300), bool)
    for how in ({}, {"smooth_k": True}, {"int8": True}):
        assert not np.asarray(flash(q, k * jnp.nan, v * jnp.nan, mask=mask, **how)).any()


@pytest.mark.parametrize("hidden", [slice(0, 200), slice(100, 900), slice(0, 899)])
def test_masked_keys_have_no_say_in_flash(hidden):
    """Whatever stands in them: neither in the sums, nor in what scores are measured against."""
    q, k, v = inputs(40, 900, 64, batch=1)
    mask = jnp.ones((1, 1, 1, 900), bool).at[..., hidden].set(False)
    expected = attention_reference(q, k, v, mask=mask)
    k = k.at[:, :, hidden].set(1e4 * q[:, :, :1])
    v = v.at[:, :, hidden].set(jnp.nan)
    assert error(flash(q, k, v, mask=mask), expected) < 2e-5


@pytest.mark.parametrize("blocks", [(128, 128, 128), (384, 512, 256), (512, 1024, 1024)])
def test_flash_is_the_same_in_any_blocks(blocks):
    q, k, v = inputs(700, 900, 128, batch=1, heads=1)
    assert error(flash(q, k, v, blocks=Blocks(*blocks)), attention_reference(q, k, v)) < 2e-5


@pytest.mark.parametrize("shape", [(1, 1, 40, 30), (2, 3, 40, 30), (2, 1, 40, 30)])
def test_xla_takes_additive_and_full_masks(shape):
    q, k, v = inputs(40, 30, 16)
    rng = np.random.default_rng(3)
    for mask in (jnp.asarray(rng.normal(size=shape), jnp.float32), jnp.asarray(rng.random(shape) < 0.5)):
        assert error(attention_xla(q, k, v, mask=mask), attention_reference(q, k, v, mask=mask)) < 1e-5


def test_xla_chunks_equal_one_piece(monkeypatch):
    q, k, v = inputs(101, 64, 32)
    mask = jnp.asarray(np.random.default_rng(4).random((2, 1, 101, 64)) < 0.5)
    whole = [
        attention_xla(q, k, v),
        attention_xla(q, k, v, mask=mask),
        attention_xla(q, k, v, mask=key_mask(64)[:, None, None]),
    ]
    monkeypatch.setattr("tpuvid.compute.kernels.xla.SCORE_BYTES", 20_000)
    pieces = [
        attention_xla(q, k, v),
        attention_xla(q, k, v, mask=mask),
        attention_xla(q, k, v, mask=key_mask(64)[:, None, None]),
    ]
    for a, b in zip(whole, pieces, strict=True):
        assert error(b, a) < 1e-6


@BACKENDS
def test_bfloat16_keeps_float32_statistics(backend):
    q, k, v = inputs(256, 384, 128, dtype=jnp.bfloat16)
    assert error(backend(q * 4, k, v), attention_reference(q * 4, k, v)) < 1e-2  # bf16 has 8 bits: 4e-3 per rounding


def test_dispatch_on_cpu_is_xla():
    q, k, v = inputs(33, 65, 16)
    with placed_on(make_mesh(MeshConfig())):
        found = attention(q, k, v, mask=key_mask(65)[:, None, None])
    assert error(found, attention_reference(q, k, v, mask=key_mask(65)[:, None, None])) < 1e-5


@pytest.mark.parametrize(
    "backend, message",
    [("flash", "runs on tpu"), ("splash", "runs on tpu"), ("cudnn", "runs on gpu"), ("magic", "choose from")],
)
def test_backend_that_cannot_run_here_is_an_error(backend, message):
    with pytest.raises(ValueError, match=message), placed_on(make_mesh(MeshConfig()), backend):
        pass


@pytest.mark.parametrize("backend", ["flash", "flash-smooth-k", "flash-int8", "splash", "cudnn"])
def test_a_kernel_that_was_asked_for_leaves_masks_that_it_does_not_take_to_xla(backend):
    """T5's scores have a bias, and it runs with the denoiser's settings."""
    place, query = Placement(attention_backend=backend), jnp.zeros((1, 2, 8, 16))
    assert _choose(place, query, jnp.zeros((1, 2, 8, 8))) == "xla"
    assert _choose(place, query, jnp.ones((1, 1, 1, 8), bool)) == _choose(place, query, None) == backend
