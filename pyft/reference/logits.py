"""What the loss takes of a tile of logits, and what it gives them back.

    u = softcap tanh(scale z / softcap), or scale z       z [M, V] as the head gives it
    lse = log Σ exp(u_c)      p_c = exp(u_c - lse)         of each row

    target = u_y      smooth = Σ w_c u_c      mean = Σ p_c u_c
    cross = Σ q_c (u_c - t_c) with t the teacher's u and q = softmax(t)

    dz_c = scale (1 - (u_c / softcap)²) (p_c (g_lse + g_mean (1 + u_c - mean))
                                         + [c = y] g_target + w_c g_smooth + q_c g_cross)

All of it in fp32 (float64 for float64).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Statistics(NamedTuple):
    """Of each row, [M]; argmax is int64."""

    lse: Tensor
    target: Tensor
    smooth: Tensor
    mean: Tensor
    cross: Tensor
    top: Tensor
    argmax: Tensor


def capped(z: Tensor, scale: float, softcap: float | None) -> Tensor:
    """u, in fp32 or float64."""
    u = z.to(torch.promote_types(z.dtype, torch.float32)) * scale
    return u if softcap is None else softcap * torch.tanh(u / softcap)


def logit_statistics(
    z: Tensor,
    labels: Tensor,
    class_weights: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    teacher: Tensor | None = None,
) -> Statistics:
    """labels int64 [M]: one that names no column has target 0. ``teacher`` is [M, V] as ``capped``
    gives it; cross is 0 without.
    """
    u = capped(z, scale, softcap)
    found = (labels >= 0) & (labels < z.shape[1])
    target = u.gather(1, labels.where(found, 0)[:, None])[:, 0].where(found, 0.0)
    p = u.softmax(1)
    smooth = u.sum(1) if class_weights is None else u @ class_weights.to(u.dtype)
    cross = torch.zeros_like(target)
    if teacher is not None:
        cross = _weighted(teacher.softmax(1), u - teacher)
    return Statistics(u.logsumexp(1), target, smooth, _weighted(p, u), cross, *u.max(1))


def logit_gradient(
    z: Tensor,
    labels: Tensor,
    class_weights: Tensor | None,
    scale: float,
    softcap: float | None,
    teacher: Tensor | None,
    lse: Tensor,
    mean: Tensor | None,
    g_lse: Tensor,
    g_target: Tensor,
    g_smooth: Tensor | None = None,
    g_mean: Tensor | None = None,
    g_cross: Tensor | None = None,
    teacher_lse: Tensor | None = None,
) -> Tensor:
    """dz [M, V] of z's dtype; every ``g`` [M]. lse, mean and ``teacher_lse`` are of whole rows, of
    which z and the teacher's logits may be some columns.
    """
    u = capped(z, scale, softcap)
    p = (u - lse[:, None]).exp()
    du = p * g_lse[:, None]
    if g_mean is not None and mean is not None:
        du += (p * (1 + u - mean[:, None])).masked_fill(p == 0, 0.0) * g_mean[:, None]
    columns = torch.arange(z.shape[1], device=z.device)
    du += g_target[:, None].where(columns == labels[:, None], 0.0)
    if g_smooth is not None:
        du += g_smooth[:, None] * (1.0 if class_weights is None else class_weights)
    if g_cross is not None and teacher is not None:
        whole = teacher.logsumexp(1) if teacher_lse is None else teacher_lse
        du += g_cross[:, None] * (teacher - whole[:, None]).exp()
    slope = 1.0 if softcap is None else 1 - (u / softcap).square()
    return (du * slope * scale).to(z.dtype)


def _weighted(p: Tensor, u: Tensor) -> Tensor:
    """Σ p_c u_c, where 0 times an infinity is 0."""
    return (p * u).masked_fill(p == 0, 0.0).sum(1)
