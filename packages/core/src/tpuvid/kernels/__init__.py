"""Attention kernels: one function, `attention`, and what runs it on each platform."""

from tpuvid.kernels.dispatch import attention, attention_backend

__all__ = ["attention", "attention_backend"]
