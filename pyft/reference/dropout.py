"""Dropout from a seed: Philox4x32-10 over the element index (Salmon et al., 2011)."""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def random_words(n: int, seed: int, device: torch.device) -> Tensor:
    """The first n words for a seed as int64 [n]: word i is output i % 4 of counter i // 4."""
    counter = torch.arange((n + 3) // 4, dtype=torch.int64, device=device)
    c0, c1 = counter & _WORD, counter >> 32
    c2 = c3 = torch.zeros_like(counter)
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (p1 >> 32 & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            (p0 >> 32 & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return torch.stack((c0, c1, c2, c3), dim=1).flatten()[:n]


def threshold(p: float) -> int:
    """Words below this are dropped: p in units of 2**-32."""
    return min(int(p * 2**32), _WORD)


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """Zero each element of x with probability p, divide the others by 1 - p."""
    keep = random_words(x.numel(), seed, x.device).view(x.shape) >= threshold(p)
    scale = 1.0 / (1.0 - p)
    scaled = x * scale if x.dtype == torch.float64 else (x.float() * scale).to(x.dtype)
    return torch.where(keep, scaled, torch.zeros((), dtype=x.dtype, device=x.device))
