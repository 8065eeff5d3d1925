import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from tpuvid.compute.kernels import rotate_heads
from tpuvid.compute.kernels.rotary import rotate_heads_pallas


def interpreted(x, cosines, sines):
    return rotate_heads_pallas(x, cosines, sines, interpret=True)


@pytest.mark.parametrize("rotate", [rotate_heads, interpreted], ids=["xla", "pallas"])
@pytest.mark.parametrize("tokens", [1, 300])
def test_pairs_turn_as_in_diffusers(rotate, tokens):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, tokens, 3 * 128)).astype(np.float32)
    angles = rng.normal(size=(tokens, 64)).repeat(2, axis=1)
    tables = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    found = rotate(jnp.asarray(x), *map(jnp.asarray, tables))
    heads = torch.tensor(x).unflatten(2, (3, 128)).transpose(1, 2)
    expected = apply_rotary_emb(heads, tuple(map(torch.tensor, tables)))
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_bfloat16_is_turned_in_float32():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(1, 8, 128)), jnp.bfloat16)
    angles = jnp.asarray(rng.normal(size=(8, 64)).repeat(2, axis=1), jnp.float32)
    exact = rotate_heads(x.astype(jnp.float32), jnp.cos(angles), jnp.sin(angles))
    for rotate in (rotate_heads, interpreted):
        found = rotate(x, jnp.cos(angles), jnp.sin(angles))
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(np.float32), exact, rtol=2**-8, atol=1e-6)
