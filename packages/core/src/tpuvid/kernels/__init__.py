"""Kernels: each is one function that picks its implementation by where it will run."""

from tpuvid.kernels.attention import attention
from tpuvid.kernels.convolution import convolution_2d, convolution_3d
from tpuvid.kernels.placement import attention_window, placed_on
from tpuvid.kernels.recording import recorded_attention
from tpuvid.kernels.rotary import rotate_heads
from tpuvid.kernels.tokens import token_attention
from tpuvid.kernels.window import Window

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
