"""Rotary position embedding of queries and keys.

The first R of a head's D dimensions are R/2 pairs, each turned by its angle at the token's
position; the others pass. A pair is (i, i + R/2), or (2i, 2i + 1) where ``interleaved``:

    first' = first cos - second sin        second' = second cos + first sin

Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding (2021).
"""

import torch
from torch import Tensor


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """q [B, Hq, S, D], k [B, Hkv, S, D] -> the same, turned.

    cos, sin [B or 1, S, R/2] of each token, or with ``positions`` [B, S] tables [P, R/2].
    """
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _turn(q, cos, sin, interleaved), None if k is None else _turn(k, cos, sin, interleaved)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = turned.unflatten(-1, (half, 2) if interleaved else (2, half))
    first, second = pairs.unbind(-1 if interleaved else -2)
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, -1 if interleaved else -2).flatten(-2)
    return torch.cat((turned, rest), -1).to(x.dtype)
