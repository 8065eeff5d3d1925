"""The Wan transformer's forward pass, written for speed in training on a CPU.

Same weights and same numbers as `WanTransformer3DModel` (`tests/tiny/test_tiny_onepass.py`), with two differences in
how they are reached: plain matrix products instead of the fused attention, whose backward pass is slow on CPUs, and one
key that stands for all padding. `WanPipeline` pads the text with zeros to 512 and masks nothing, so that some 500
identical keys take part in every softmax; one such key whose logit is raised by log(their number) is exactly as strong.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def rms(layer: nn.RMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], layer.weight.to(x.dtype), layer.eps)


def heads(x: Tensor, count: int) -> Tensor:
    """[B, T, N*D] to [B, N, T, D]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on ``x`` [B, N, T, D]; ``cos`` and ``sin`` are [T, D/2]."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention, [B, N, T, D] to [B, T, N*D]; ``bias`` [B, 1, 1, S] is added to the logits."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if bias is not None:
        logits = logits + bias
    return (torch.softmax(logits, dim=-1) @ v).transpose(1, 2).flatten(2)


def with_padding(text: Tensor, mask: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Append the one padding key, and say how strong each key is.

    ``text`` [B, L, E] and ``mask`` [B, L] hold the words, ``length`` [B] the number of keys the pipeline would pass.
    Returns the text [B, L+1, E] and the logits' bias [B, 1, 1, L+1].
    """
    text = F.pad(text * mask[..., None], (0, 0, 0, 1))
    words = torch.zeros_like(mask, dtype=torch.float32).masked_fill(mask == 0, -1e4)
    padding = (length - mask.sum(dim=1)).float().log()[:, None]
    return text, torch.cat([words, padding], dim=1)[:, None, None]


def forward(
    model: WanTransformer3DModel, x: Tensor, timestep: Tensor, text: Tensor, bias: Tensor, dtype: torch.dtype
) -> Tensor:
    """Predict the velocity [B, z, f, h, w] of ``x`` at ``timestep`` [B] in 0..1000, in float32."""
    cos, sin = rotary(model, x, dtype)
    shape = x.shape
    count = model.config.num_attention_heads
    embed = model.patch_embedding
    x = linear_patches(embed, x.to(dtype))
    condition = model.condition_embedder
    time = condition.time_embedder(condition.timesteps_proj(timestep))
    modulation = condition.time_proj(F.silu(time)).unflatten(1, (6, -1))
    words = condition.text_embedder
    text = linear(words.linear_2, F.gelu(linear(words.linear_1, text.to(dtype)), approximate="tanh"))
    bias = bias.to(dtype)
    width = (x.shape[-1],)
    for block in model.blocks:
        shift, scale, gate, c_shift, c_scale, c_gate = (block.scale_shift_table + modulation).to(dtype).chunk(6, dim=1)

        y = F.layer_norm(x, width) * (1 + scale) + shift
        own = block.attn1
        q = rotate(heads(rms(own.norm_q, linear(own.to_q, y)), count), cos, sin)
        k = rotate(heads(rms(own.norm_k, linear(own.to_k, y)), count), cos, sin)
        x = x + gate * linear(own.to_out[0], attend(q, k, heads(linear(own.to_v, y), count)))

        y = F.layer_norm(x, width, block.norm2.weight.to(dtype), block.norm2.bias.to(dtype))
        cross = block.attn2
        q = heads(rms(cross.norm_q, linear(cross.to_q, y)), count)
        k = heads(rms(cross.norm_k, linear(cross.to_k, text)), count)
        x = x + linear(cross.to_out[0], attend(q, k, heads(linear(cross.to_v, text), count), bias))

        y = F.layer_norm(x, width) * (1 + c_scale) + c_shift
        y = linear(block.ffn.net[2], F.gelu(linear(block.ffn.net[0].proj, y), approximate="tanh"))
        x = x + c_gate * y
    shift, scale = (model.scale_shift_table + time[:, None]).to(dtype).chunk(2, dim=1)
    x = linear(model.proj_out, F.layer_norm(x, width) * (1 + scale) + shift)
    return pixels(x.float(), shape, model.config.patch_size)


def linear_patches(embed: nn.Conv3d, x: Tensor) -> Tensor:
    """The patch embedding, a convolution whose stride is its kernel, as a matrix product: [B, T, E]."""
    b, c, f, h, w = x.shape
    _, p, q = embed.kernel_size
    x = x.view(b, c, f, h // p, p, w // q, q).permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)
    return F.linear(x, embed.weight.flatten(1).to(x.dtype), embed.bias.to(x.dtype))


def pixels(x: Tensor, shape: torch.Size, patch: tuple[int, int, int]) -> Tensor:
    """Tokens [B, T, p*q*C] back to [B, C, f, h, w]."""
    b, c, f, h, w = shape
    _, p, q = patch
    x = x.view(b, f, h // p, w // q, p, q, c)
    return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(b, c, f, h, w)


def rotary(model: WanTransformer3DModel, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, D/2]; the model's own tables hold each number twice."""
    cos, sin = model.rope(x)
    return cos[0, :, 0, 0::2].to(dtype), sin[0, :, 0, 1::2].to(dtype)
