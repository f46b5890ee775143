"""Tensors as rows: what kernels take."""

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """x [..., D] as [M, D] with adjacent columns; copied only where its strides ask for it."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def rows_with_room(like: Tensor, rows: int, cols: int, tail: int) -> Tensor:
    """An empty [rows, cols] in memory of ``tail`` more columns; no view, so that it may be written
    to when an op has returned it.
    """
    if tail == 0:
        return like.new_empty(rows, cols)
    memory = like.new_empty(rows * (cols + tail)).untyped_storage()
    return like.new_empty(0).set_(memory, 0, (rows, cols), (cols + tail, 1))
