import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tpuvid.compute.kernels.placement import picture_split
from tpuvid.compute.kernels.spatial import choose_split
from tpuvid.compute.operators import conv2d, group_norm, pad


@pytest.mark.parametrize(
    "latents, devices, axis, parts, size",
    [
        ((90, 160), 8, -1, 8, 20),  # Wan at 720p: 8 divides the width alone
        ((96, 170), 8, -2, 8, 12),  # CogVideoX 1.5 at 768 × 1360
        ((30, 53), 8, -1, 8, 7),  # HunyuanVideo at 480p: neither; 3 columns of the last strip are none of the picture's
        ((9, 9), 8, -2, 5, 2),  # no device without a row
    ],
)
def test_the_side_that_leaves_each_device_the_least(latents, devices, axis, parts, size):
    split = choose_split(*latents, devices)
    assert (split.axis, split.parts, split.size) == (axis, parts, size)
    assert split.size * (split.parts - 1) < split.length <= split.size * split.parts


def test_one_device_splits_nothing():
    assert choose_split(90, 160, 1) is None


def test_padding_is_torchs_where_nothing_is_split():
    x = np.random.default_rng(0).standard_normal((1, 2, 3, 4, 5), np.float32)
    for how in ({}, {"mode": "replicate"}, {"value": 2.0}):
        expected = torch.nn.functional.pad(torch.from_numpy(x), (1, 2, 0, 1, 2, 0), **how)
        np.testing.assert_array_equal(pad(jnp.asarray(x), (1, 2, 0, 1, 2, 0), **how), expected)


def test_what_strips_can_not_do_is_refused():
    with picture_split(choose_split(8, 4, 2)), pytest.raises(ValueError, match="not supported"):
        pad(jnp.zeros((1, 1, 1, 4, 4)), (1, 1), value=1.0)
    with picture_split(choose_split(8, 4, 2)), pytest.raises(ValueError, match="stride"):
        conv2d(jnp.zeros((1, 1, 4, 4)), jnp.zeros((1, 1, 3, 3)), stride=2, padding=1)
    with pytest.raises(ValueError, match="reflect"):
        pad(jnp.zeros((1, 1, 1, 4, 4)), (1, 1), mode="reflect")


def test_group_norm_is_torchs_in_float32():
    x = np.random.default_rng(0).standard_normal((2, 6, 3, 4, 5), np.float32)
    weight, bias = np.arange(6, dtype=np.float32), np.ones(6, np.float32)
    found = jax.jit(group_norm, static_argnums=1)(x, 3, weight, bias)
    expected = torch.nn.functional.group_norm(
        *(torch.from_numpy(v) if i != 1 else v for i, v in enumerate([x, 3, weight, bias]))
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)
