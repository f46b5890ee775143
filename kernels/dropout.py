"""Dropout from a seed: y = x * keep / (1 - p), keep a function of (seed, element index).

The same words as ``pyft.reference.dropout``. Bytes moved: each element read and written once; four
elements share a counter's words.
"""

import triton
import triton.language as tl
from torch import Tensor

from pyft.kernels import configs
from pyft.kernels.tiles import keep_tile


@triton.jit(do_not_specialize=["seed", "threshold", "scale"])
def dropout_kernel(x_ptr, out_ptr, n, seed, threshold, scale, TILE: tl.constexpr):
    """TILE elements of x [n], a multiple of 4."""
    start = tl.program_id(0).to(tl.int64) * TILE
    row = tl.zeros((1,), tl.int64)
    keep = keep_tile(row, start, 0, seed, threshold, TILE, True).reshape(TILE)
    offs = start + tl.arange(0, TILE)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
    y = tl.where(keep, x * scale, 0.0)
    tl.store(out_ptr + offs, y.to(out_ptr.dtype.element_ty), mask=offs < n)


def dropout(
    x: Tensor,
    seed: int,
    threshold: int,
    scale: float,
    out: Tensor,
    config: configs.Dropout = configs.DROPOUT,
) -> None:
    """Contiguous x of any shape -> out of the same shape and dtype."""
    n = x.numel()
    if n == 0:
        return
    dropout_kernel[(triton.cdiv(n, config.tile),)](
        x, out, n, seed, threshold, scale, TILE=config.tile, num_warps=config.num_warps
    )
