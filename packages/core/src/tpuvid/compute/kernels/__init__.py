"""Kernels: each is one function that picks its implementation by where it will run."""

from tpuvid.compute.kernels.attention import attention
from tpuvid.compute.kernels.attention_record import recorded_attention
from tpuvid.compute.kernels.convolution import convolution_2d, convolution_3d
from tpuvid.compute.kernels.placement import attention_window, placed_on
from tpuvid.compute.kernels.rotary import rotate_heads
from tpuvid.compute.kernels.tokens import token_attention
from tpuvid.compute.kernels.window import Window

__all__ = [
    "Window",
    "attention",
    "attention_window",
    "convolution_2d",
    "convolution_3d",
    "placed_on",
    "recorded_attention",
    "rotate_heads",
    "token_attention",
]
