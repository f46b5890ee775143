"""``torch.nn.functional.scaled_dot_product_attention``'s arguments, on ``pyft.attention``."""

from typing import Any

import torch
from torch import Tensor

from pyft.errors import UsageError
from pyft.ops.attention import attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What torch's function of this name computes, in its place.

    Args:
        query: [..., Hq, L, D]; key, value: [..., Hkv, S, D] and [..., Hkv, S, Dv]; leading
            dimensions alike. Without a head dimension, [L, D], too.
        attn_mask: boolean, True where a query sees a key, or floating, added to the scores;
            broadcast to [..., Hq, L, S].
        dropout_p: as torch, dropped whether or not a module is training.
        is_causal: query i sees keys j <= i, counted from the first query and key (``attention``
            counts from the last); not together with attn_mask.
        scale: None: 1 / sqrt(D).
        enable_gqa: Hkv may divide Hq. Heads are not broadcast without it.

    Returns:
        [..., Hq, L, Dv]. A row whose mask is all False gives 0.

    Raises:
        UsageError: as ``attention``; is_causal with attn_mask.
    """
    if is_causal and attn_mask is not None:
        raise UsageError("scaled_dot_product_attention: pass attn_mask or is_causal=True, not both")
    if query.dim() < 2 or key.dim() != query.dim() or value.dim() != query.dim():
        raise UsageError(
            f"scaled_dot_product_attention: query {tuple(query.shape)}, key {tuple(key.shape)} and "
            f"value {tuple(value.shape)} need the same number of dimensions, at least 2"
        )
    if query.dim() > 2 and not enable_gqa and query.shape[-3] != key.shape[-3]:
        raise UsageError(
            f"scaled_dot_product_attention: {query.shape[-3]} query heads and {key.shape[-3]} key "
            "heads; set enable_gqa=True"
        )
    try:
        leading = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    except RuntimeError as error:
        raise UsageError(
            f"scaled_dot_product_attention: the leading dimensions of query {tuple(query.shape)}, "
            f"key {tuple(key.shape)} and value {tuple(value.shape)} do not fit one another"
        ) from error
    q, k, v = (_four(x.expand(*leading, *x.shape[-3:])) for x in (query, key, value))
    bias = None
    if attn_mask is not None:
        heads = (*query.shape[-3:-2],)
        bias = _bias(attn_mask, (*leading, *heads), query)
    shift = query.shape[-2] - key.shape[-2] if is_causal else 0
    o: Any = attention(
        q, k, v, causal=is_causal, scale=scale, bias=bias, dropout_p=dropout_p, shift=shift
    )
    found: Tensor = o.reshape(*leading, *query.shape[-3:-1], value.shape[-1])
    return found


def _four(x: Tensor) -> Tensor:
    """[..., H, S, D] as [B, H, S, D]."""
    return x.reshape(x.shape[:-3].numel(), *(x.shape[-3:] if x.dim() > 2 else (1, *x.shape)))


def _bias(mask: Tensor, outer: tuple[int, ...], query: Tensor) -> Tensor:
    """The mask as a bias of four dimensions, not expanded where one value serves all."""
    if mask.dtype == torch.bool:
        mask = torch.zeros((), dtype=query.dtype, device=mask.device).where(mask, -torch.inf)
    mask = mask.reshape((1,) * (len(outer) + 2 - mask.dim()) + mask.shape)
    leading = mask.shape[:-3]
    if any(size != 1 for size in leading) and leading != outer[:-1]:
        mask = mask.expand(*outer[:-1], *mask.shape[-3:])
    return _four(mask)
