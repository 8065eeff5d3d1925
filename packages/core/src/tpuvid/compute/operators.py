"""The operators of `torch.nn.functional` that stock modules call and torchax gets wrong or slow, on JAX arrays.

Each takes what torch's own takes, as far as the models need it, and raises `ValueError` for the rest. Where frames are in
strips over devices, they work across strips (`tpuvid.compute.kernels.spatial`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from tpuvid.compute.kernels import attention, convolution_2d, convolution_3d
from tpuvid.compute.kernels.placement import placement
from tpuvid.compute.kernels.spatial import gather_keys, spatial_mean, take_halo

NAMES = ("scaled_dot_product_attention", "conv2d", "conv3d", "pad", "interpolate", "layer_norm", "group_norm")
"""The names of the operators in this module that take the place of torch's."""


def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Array:
    """`F.scaled_dot_product_attention` ([B, N, T, D]) on our kernels."""
    if dropout_p or is_causal or enable_gqa:
        raise ValueError(f"attention with {dropout_p=}, {is_causal=}, {enable_gqa=} is not supported")
    if placement().spatial is not None:
        key, value, attn_mask = gather_keys(key, value, attn_mask)
    return attention(query, key, value, mask=attn_mask, scale=scale)


def _convolution(
    kernel: Callable[..., Array],
    ndim: int,
    input: Array,
    weight: Array,
    bias: Array | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Array:
    def per_axis(value: int | Sequence[int]) -> tuple[int, ...]:
        return (value,) * ndim if isinstance(value, int) else tuple(value)

    if per_axis(dilation) != (1,) * ndim or groups != 1 or isinstance(padding, str):
        raise ValueError(f"convolution with {padding=}, {dilation=}, {groups=} is not supported")
    if placement().spatial is not None and per_axis(stride) != (1,) * ndim:
        raise ValueError(f"convolution of strips with {stride=} is not supported")
    input, pads = take_halo(input, [(p, p) for p in per_axis(padding)])
    return kernel(input, weight, bias, stride=per_axis(stride), padding=tuple(before for before, _ in pads))


conv2d = partial(_convolution, convolution_2d, 2)
conv3d = partial(_convolution, convolution_3d, 3)


def pad(input: Array, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Array:
    """`F.pad` with a constant or by repeating the edge; `pad` begins with the last dimension."""
    if mode not in ("constant", "replicate") or (value and placement().spatial is not None):
        raise ValueError(f"padding with {mode=}, {value=} is not supported")
    pads = list(zip(pad[::2], pad[1::2], strict=True))[::-1]
    input, pads = take_halo(input, [(0, 0)] * (input.ndim - len(pads)) + pads, repeat=mode == "replicate")
    return jnp.pad(input, pads, mode="edge") if mode == "replicate" else jnp.pad(input, pads, constant_values=value or 0)


def interpolate(
    x: Array,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Array:
    """Nearest upsampling of [B, C, *spatial] by whole factors, as broadcast + reshape: no gathers."""
    ndim = x.ndim - 2
    factors: Sequence[float | None]
    if size is not None:
        sizes = size if isinstance(size, (tuple, list)) else [size] * ndim
        factors = [new / old for new, old in zip(sizes, x.shape[2:], strict=True)]
    else:
        factors = scale_factor if isinstance(scale_factor, Sequence) else [scale_factor] * ndim
    whole = [int(f) for f in factors if f is not None and f >= 1 and f == int(f)]
    if mode not in ("nearest", "nearest-exact") or len(whole) < len(factors):
        raise ValueError(f"interpolation with {size=}, {scale_factor=}, {mode=} of {x.shape} is not supported")
    for axis, factor in enumerate(whole, start=2):
        x = jnp.repeat(x, factor, axis=axis) if factor > 1 else x
    return x


def layer_norm(
    input: Array, normalized_shape: Sequence[int], weight: Array | None = None, bias: Array | None = None, eps: float = 1e-5
) -> Array:
    """`F.layer_norm`; statistics and scaling in float32 as in torch, where torchax's own take those of bfloat16 in bfloat16."""
    out = _normalized(input.astype(jnp.float32), tuple(range(-len(normalized_shape), 0)), eps)
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias).astype(input.dtype)


def group_norm(
    input: Array, num_groups: int, weight: Array | None = None, bias: Array | None = None, eps: float = 1e-5
) -> Array:
    """`F.group_norm` of [B, C, *spatial]; float32 within, as `layer_norm`."""
    groups, axes = _groups(input, num_groups)
    out = _normalized(groups, axes, eps, spatial_mean).reshape(input.shape)
    per_channel = (-1, *(1,) * (input.ndim - 2))
    out = out if weight is None else out * weight.reshape(per_channel)
    return (out if bias is None else out + bias.reshape(per_channel)).astype(input.dtype)


def group_statistics(input: Array, num_groups: int, eps: float) -> tuple[Array, ...]:
    """What `group_norm` takes away from each group of [B, C, *spatial], and multiplies it by: [B, groups] each, float32."""
    return tuple(x.reshape(x.shape[:2]) for x in _statistics(*_groups(input, num_groups), eps, spatial_mean))


def _groups(input: Array, num_groups: int) -> tuple[Array, tuple[int, ...]]:
    """[B, groups, …] in float32, and the axes of one group."""
    groups = input.astype(jnp.float32).reshape(input.shape[0], num_groups, -1, *input.shape[2:])
    return groups, tuple(range(2, groups.ndim))


_mean = partial(jnp.mean, keepdims=True)


def _normalized(x: Array, axes: tuple[int, ...], eps: float, mean: Callable[..., Array] = _mean) -> Array:
    centre, factor = _statistics(x, axes, eps, mean)
    return (x - centre) * factor


def _statistics(x: Array, axes: tuple[int, ...], eps: float, mean: Callable[..., Array]) -> tuple[Array, Array]:
    """The mean, and one over the root of variance and `eps`."""
    centre = mean(x, axes)
    return centre, jax.lax.rsqrt(mean((x - centre) ** 2, axes) + eps)
