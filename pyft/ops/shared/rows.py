"""Tensors as rows: what kernels take."""

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """x [..., D] as [M, D] with adjacent columns; copied only where its strides ask for it."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
