"""Tensors of heads, [B, H, S, D]: what attention and the rotary embedding take and give."""

from torch import Tensor


def adjacent(x: Tensor) -> Tensor:
    """x [..., D] with adjacent elements in the last dimension; copied only where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_heads(like: Tensor, dim: int | None = None) -> Tensor:
    """An empty [B, H, S, D] like ``like``, or with D ``dim``, in memory [B, S, H, D]: as the
    projections write, and read, it.
    """
    b, h, s, d = like.shape
    d = d if dim is None else dim
    return like.new_empty_strided((b, h, s, d), (s * h * d, d, h * d, 1))
