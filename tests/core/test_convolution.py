import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tpuvid.kernels.convolution import _as_2d, _direct, convolution_3d


@pytest.mark.parametrize("implementation", [_direct, _as_2d])
@pytest.mark.parametrize(
    "kernel, stride, padding",
    [((3, 3, 3), (1, 1, 1), (0, 1, 1)), ((3, 1, 1), (1, 1, 1), (1, 0, 0)), ((1, 2, 2), (1, 2, 2), (0, 0, 0)), ((2, 3, 1), (1, 1, 2), (2, 1, 0))],
)
def test_both_implementations_equal_torch(implementation, kernel, stride, padding):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 6, 8, 10), torch.randn(7, 5, *kernel)
    expected = torch.nn.functional.conv3d(x, weight, stride=stride, padding=padding)
    found = implementation(jnp.asarray(x.numpy()), jnp.asarray(weight.numpy()), stride, padding)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_stride_in_time_and_bias():
    x, weight, bias = torch.randn(1, 2, 7, 4, 4), torch.randn(3, 2, 3, 3, 3), torch.randn(3)
    expected = torch.nn.functional.conv3d(x, weight, bias, stride=(2, 1, 1), padding=1)
    found = convolution_3d(*(jnp.asarray(a.numpy()) for a in (x, weight, bias)), stride=(2, 1, 1), padding=(1, 1, 1))
    np.testing.assert_allclose(found, expected, atol=1e-4)
