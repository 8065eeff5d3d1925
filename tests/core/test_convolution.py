import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tpuvid.compute.kernels import convolution_2d, convolution_3d
from tpuvid.compute.kernels.placement import Placement

CASES_3D = [((3, 3, 3), (1, 1, 1), (0, 1, 1)), ((3, 1, 1), (1, 1, 1), (1, 0, 0)), ((1, 2, 2), (1, 2, 2), (0, 0, 0)),
            ((2, 3, 1), (1, 1, 2), (2, 1, 0)), ((3, 3, 3), (2, 1, 1), (1, 1, 1))]  # fmt: skip
CASES_2D = [((3, 3), (1, 1), (1, 1)), ((1, 1), (1, 1), (0, 0)), ((3, 2), (2, 1), (0, 1))]


@pytest.fixture(params=["cpu", "tpu"])
def platform(request, monkeypatch):
    """What is chosen for that platform, run here: both are plain XLA."""
    monkeypatch.setattr(Placement, "platform", request.param)


@pytest.mark.parametrize("kernel, stride, padding", CASES_3D + CASES_2D)
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_implementation_equals_torch(platform, kernel, stride, padding, with_bias):
    torch.manual_seed(0)
    ndim = len(kernel)
    x, weight = torch.randn(2, 5, *(6, 8, 10)[:ndim]), torch.randn(7, 5, *kernel)
    bias = torch.randn(7) if with_bias else None
    stock = {2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}[ndim]
    ours = {2: convolution_2d, 3: convolution_3d}[ndim]
    expected = stock(x, weight, bias, stride=stride, padding=padding)
    arrays = [None if a is None else jnp.asarray(a.numpy()) for a in (x, weight, bias)]
    np.testing.assert_allclose(ours(*arrays, stride=stride, padding=padding), expected, atol=1e-4)
