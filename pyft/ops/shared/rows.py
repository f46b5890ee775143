"""Tensors as rows: what kernels take."""

from torch import Tensor

from pyft.backend import large_empty

_MUCH = 4 << 20  # bytes


def as_rows(x: Tensor) -> Tensor:
    """x [..., D] as [M, D] with adjacent columns; copied only where its strides ask for it."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def empty_rows(like: Tensor, rows: int, cols: int) -> Tensor:
    """An empty [rows, cols]; where that is much, a CPU is asked for it in large pages."""
    if like.device.type != "cpu" or rows * cols * like.element_size() < _MUCH:
        return like.new_empty(rows, cols)
    return large_empty((rows, cols), like.dtype, like.device)


def rows_with_room(like: Tensor, rows: int, cols: int, tail: int) -> Tensor:
    """An empty [rows, cols] in memory of ``tail`` more columns; no view, so that it may be written
    to when an op has returned it.
    """
    if tail == 0:
        return empty_rows(like, rows, cols)
    memory = empty_rows(like, rows, cols + tail).untyped_storage()
    return like.new_empty(0).set_(memory, 0, (rows, cols), (cols + tail, 1))
