"""Attention of grouped heads, with everything scores are known to be changed by.

    s = scale q kᵀ              softcap tanh(s / softcap)              + bias - slope |p - j|
    lse = log(sum exp(s) + exp(sink))         o = dropped(exp(s - lse)) v

over the keys j that query i sees, p - left <= j <= p + right: it stands at p = i + Sk - Sq + shift.
A query that sees no key: o = 0 and lse = sink, -infinity without one.
"""

import torch
from torch import Tensor

from pyft.reference.dropout import random_words, threshold


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    left: int | None = None,
    right: int | None = None,
    shift: int = 0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Sq, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv] -> o [B, Hq, Sq, Dv], lse [B, Hq, Sq]
    in fp32 (of float64: float64).

    sinks [Hq]; bias [B, Hq, Sq, Sk], each or 1; alibi_slopes [Hq] or [B, Hq]; cu_seqlens int
    [n + 1] where sequences follow one another along S, B = 1. With dropout, word
    ((b Hq + h) Sq + i) pitch + j of the seed decides about query i and key j of its sequence; pitch
    is Sk, rounded up to 4.
    """
    places = _places(q.shape[2], k.shape[2], shift, cu_seqlens_q, cu_seqlens_k, q.device)
    scores, _ = _scores(q, k, scale, left, right, softcap, bias, alibi_slopes, places)
    column = scores.new_empty(*scores.shape[:3], 0)
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
    lse = _logsumexp(torch.cat([scores, column], dim=-1))
    p = torch.exp(scores - _finite(lse)[..., None])
    if dropout_p > 0:
        p = p * _kept(p, places[1], dropout_p, seed)
    return p.to(q.dtype) @ _for_queries(v, q.shape[1]), lse


def attention_backward(
    do: Tensor,
    dlse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    left: int | None = None,
    right: int | None = None,
    shift: int = 0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, sinks and bias, given those of o and lse; the equations are those of
    ``pyft.ops.attention``. k and v may be a part of the keys that o and lse are of.
    """
    places = _places(q.shape[2], k.shape[2], shift, cu_seqlens_q, cu_seqlens_k, q.device)
    scores, bent = _scores(q, k, scale, left, right, softcap, bias, alibi_slopes, places)
    p = torch.exp(scores - _finite(lse)[..., None])
    dp = (do @ _for_queries(v, q.shape[1]).transpose(-1, -2)).to(p.dtype)
    dropped = p
    if dropout_p > 0:
        kept = _kept(p, places[1], dropout_p, seed)
        dropped, dp = p * kept, dp * kept
    delta = (do.to(p.dtype) * o.to(p.dtype)).sum(-1)
    delta = delta if dlse is None else delta - dlse
    ds = p * (dp - delta[..., None])
    dbias = None if bias is None else ds.sum_to_size(bias.shape).to(bias.dtype)
    dsinks = None
    if sinks is not None:
        share = torch.exp(sinks.to(p.dtype)[:, None] - _finite(lse)) * delta
        dsinks = -share.masked_fill(lse == -torch.inf, 0.0).sum((0, 2)).to(sinks.dtype)
    ds = (ds * scale if bent is None else ds * (1 - bent * bent) * scale).to(q.dtype)
    dv = _for_keys(dropped.to(q.dtype).transpose(-1, -2) @ do, v)
    return ds @ _for_queries(k, q.shape[1]), _for_keys(ds.mT @ q, k), dv, dsinks, dbias


def _scores(
    q: Tensor,
    k: Tensor,
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    places: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor | None]:
    """Scores [B, Hq, Sq, Sk], -infinity where not seen, and the tanh in them."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ _for_queries(k, q.shape[1]).transpose(-1, -2)).to(wide) * scale
    bent = None
    if softcap is not None:
        bent = torch.tanh(scores / softcap)
        scores = softcap * bent
    if bias is not None:
        scores = scores + bias.to(wide)
    position, key, seen = places
    distance = position[:, None] - key
    if slopes is not None:
        scores = scores - slopes.to(wide)[..., None, None] * distance.abs()
    seen = seen if left is None else seen & (distance <= left)
    seen = seen if right is None else seen & (-distance <= right)
    return scores.masked_fill(~seen, -torch.inf), bent


def _kept(p: Tensor, key: Tensor, dropout_p: float, seed: int) -> Tensor:
    """What dropout multiplies P by: 0 or 1 / (1 - dropout_p)."""
    b, hq, sq, sk = p.shape
    pitch = (sk + 3) // 4 * 4
    rows = torch.arange(b * hq * sq, device=p.device).view(b, hq, sq, 1)
    words = random_words(b * hq * sq * pitch, seed, p.device)
    kept = words[rows * pitch + key.expand(sq, sk)] >= threshold(dropout_p)
    return kept.to(p.dtype) / (1.0 - dropout_p)


def _for_keys(gradient: Tensor, x: Tensor) -> Tensor:
    """Gradients of ``_for_queries(x)`` summed over the query heads."""
    b, h = x.shape[:2]
    if h == 0:
        return torch.zeros_like(x)
    return gradient.view(b, h, gradient.shape[1] // h, *gradient.shape[2:]).sum(2)


def _for_queries(x: Tensor, heads: int) -> Tensor:
    """Keys or values repeated for the query heads that read them."""
    return x.repeat_interleave(heads // max(1, x.shape[1]), dim=1)


def _finite(lse: Tensor) -> Tensor:
    """0 where nothing is seen."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _places(
    sq: int, sk: int, shift: int, cu_q: Tensor | None, cu_k: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each query where it stands, of each key its place in its sequence, and which are of one
    sequence: [Sq], [Sk], [Sq, Sk].
    """
    query, key = (torch.arange(s, device=device) for s in (sq, sk))
    if cu_q is None or cu_k is None:
        return query + sk - sq + shift, key, torch.ones(sq, sk, dtype=torch.bool, device=device)
    cu_q, cu_k = cu_q.long(), cu_k.long()
    of_query = torch.searchsorted(cu_q, query, right=True) - 1
    of_key = torch.searchsorted(cu_k, key, right=True) - 1
    behind = (cu_k.diff() - cu_q.diff() - cu_q[:-1])[of_query]
    return query + behind + shift, key - cu_k[of_key], of_query[:, None] == of_key


def _logsumexp(scores: Tensor) -> Tensor:
    """Of rows that may be all -infinity, whose gradient is 0 then."""
    top = scores.detach().amax(dim=-1, keepdim=True) if scores.shape[-1] else scores.new_zeros(1)
    top = _finite(top)
    total = torch.exp(scores - top).sum(dim=-1)
    empty = total == 0
    return torch.where(
        empty, -torch.inf, torch.log(total.masked_fill(empty, 1.0)) + top.squeeze(-1)
    )
