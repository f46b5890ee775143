"""Attention over a part of the keys after another, merged by the log-sum-exp of each."""

from typing import Any

import torch
from torch import Tensor

from pyft.reference.attention import attention


def chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float | None,
    size: int,
) -> tuple[Tensor, Tensor]:
    """o and lse of ``attention``; ``size`` keys at a time, the sinks with the first."""
    found: list[Any] = []
    sk = k.shape[2]
    for start in range(0, max(sk, 1), size):
        part = slice(start, min(sk, start + size))
        keys, values = (x[:, :, part].to(q.device) for x in (k, v))
        shift = sk - part.stop
        found.append(
            attention(q, keys, values, scale, left, right, shift, softcap, sinks, None, slopes)
        )
        sinks = None
    outputs, sums = (torch.stack(parts) for parts in zip(*found, strict=True))
    top = sums.detach().amax(0)
    top = top.masked_fill(top == -torch.inf, 0.0)
    shares = torch.exp(sums - top)
    total = shares.sum(0)
    unseen = total == 0
    o = (shares[..., None] * outputs).sum(0) / total.masked_fill(unseen, 1.0)[..., None]
    lse = torch.log(total.masked_fill(unseen, 1.0)) + top
    return o.to(q.dtype), lse.masked_fill(unseen, -torch.inf)
