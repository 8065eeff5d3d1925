import jax.numpy as jnp
import numpy as np
import pytest
from tpuvid.kernels import attention, placed_on
from tpuvid.kernels.reference import attention_reference
from tpuvid.kernels.splash import attention_splash
from tpuvid.kernels.xla import attention_xla
from tpuvid.mesh import MeshConfig, make_mesh

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


@pytest.mark.parametrize("backend", [attention_xla, splash], ids=["xla", "splash"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_oracle(backend, shape, masked):
    q, k, v = inputs(*shape)
    mask = key_mask(shape[1])[:, None, None] if masked else None
    expected = attention_reference(q, k, v, mask=mask, scale=0.2)
    found = backend(q, k, v, mask=mask, scale=0.2)
    assert np.isfinite(found).all()
    assert error(found, expected) < 2e-5  # float32, another order of summation


def test_padding_keys_take_no_weight():
    """Zero keys that are merely padded would enter the softmax with weight e⁰: here each real score is far below that."""
    q, k, v = inputs(16, 100, 64)
    q, k = jnp.abs(q), -jnp.abs(k)
    assert error(splash(q, k, v), attention_reference(q, k, v)) < 2e-5


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
    monkeypatch.setattr("tpuvid.kernels.xla.SCORE_BYTES", 20_000)
    pieces = [
        attention_xla(q, k, v),
        attention_xla(q, k, v, mask=mask),
        attention_xla(q, k, v, mask=key_mask(64)[:, None, None]),
    ]
    for a, b in zip(whole, pieces):
        assert error(b, a) < 1e-6


@pytest.mark.parametrize("backend", [attention_xla, splash], ids=["xla", "splash"])
def test_bfloat16_keeps_float32_statistics(backend):
    q, k, v = inputs(256, 384, 128, dtype=jnp.bfloat16)
    assert error(backend(q * 4, k, v), attention_reference(q * 4, k, v)) < 1e-2  # bf16 has 8 bits: 4e-3 per rounding


def test_dispatch_on_cpu_is_xla():
    q, k, v = inputs(33, 65, 16)
    with placed_on(make_mesh(MeshConfig())):
        found = attention(q, k, v, mask=key_mask(65)[:, None, None])
    assert error(found, attention_reference(q, k, v, mask=key_mask(65)[:, None, None])) < 1e-5


@pytest.mark.parametrize("backend, message", [("splash", "runs on tpu"), ("cudnn", "runs on gpu"), ("magic", "choose from")])
def test_backend_that_cannot_run_here_is_an_error(backend, message):
    with pytest.raises(ValueError, match=message), placed_on(make_mesh(MeshConfig()), backend):
        pass
