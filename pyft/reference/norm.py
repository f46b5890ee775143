"""Normalization over the last dimension, with the residual added first.

    h = x + residual                             rounded to x's dtype
    rms_norm     y = h / sqrt(mean(h²) + eps) (offset + weight)
    layer_norm   y = (h - mean(h)) / sqrt(mean((h - mean(h))²) + eps) weight + bias

Sources: Zhang and Sennrich, Root Mean Square Layer Normalization (2019); Ba et al., Layer
Normalization (2016).
"""

import torch
from torch import Tensor


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """x, residual [..., D], weight [D] -> y [..., D] and h [..., D]."""
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * (weight.to(y.dtype) + offset)).to(x.dtype), h


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x, residual [..., D], weight, bias [D] -> y [..., D] and h [..., D]."""
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    centered = wide - wide.mean(-1, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype), h
