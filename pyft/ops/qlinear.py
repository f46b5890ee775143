"""The linear over a frozen quantized weight, forward and the gradient of its input.

    y = x Wᵀ + bias        x [M, K]   W [N, K]   y, dY [M, N]
    dX = dY W

W is rounded once to x's dtype. For many rows it is decoded into the scratch (``pyft.scratch``) and
read by the vendor matmul: forward in slabs of rows, backward in slabs of columns where the scratch
is smaller than W, so that no sum is ever split. For few rows a kernel decodes it on the fly;
nothing is saved. Sources: ``pyft.formats``.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from pyft.backend import backend, device_guard, implementation, select
from pyft.formats import FORMATS
from pyft.ops.lora_matmul import LowRank, Wide, product
from pyft.ops.quantize import DTYPES, decode_tables, dequantize_slab
from pyft.ops.shared.rows import empty_rows
from pyft.quantized import columns_of, named_parts
from pyft.scratch import Slab, decoded, slabs

# Up to how many rows the kernel that decodes on the fly is the faster one. The CPU's numbers are
# those of benchmarks/fused_rows.py (AMD EPYC, AVX-512 with bf16 products; 128 is as far as it was
# measured); the GPUs' are what a memory-bound product allows, not measured yet.
FUSED_ROWS = {
    "cpu": {torch.float32: 128, torch.float16: 128, torch.bfloat16: 48},
    "cuda": dict.fromkeys(DTYPES, 8),
    "triton": dict.fromkeys(DTYPES, 16),
    "reference": dict.fromkeys(DTYPES, 0),
}


@dataclass(frozen=True)
class Stored:
    """A quantized weight [rows, cols] as an op is given it."""

    parts: list[Tensor]
    format: str
    block_size: int
    shape: tuple[int, int]

    def slab(self, slab: Slab, dtype: torch.dtype, tail: int = 0) -> AbstractContextManager[Tensor]:
        """A context with rows slab[0] to slab[1], columns slab[2] to slab[3] decoded, and ``tail``
        columns to write to beside them.
        """

        def decode(out: Tensor) -> None:
            arguments = (self.parts, FORMATS[self.format], self.block_size, self.shape)
            dequantize_slab(*arguments, slab, out)

        return decoded(self.parts, (self.format, self.block_size, slab), dtype, decode, tail)


def forward(
    x: Tensor,
    w: Stored,
    bias: Tensor | None,
    name: str,
    low: LowRank | None = None,
    wide: Wide | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + bias + the low-rank product; x [M, K] in any floating dtype, bias [N] of x's dtype or
    None. ``wide`` holds x and the adapter's input side by side: one matmul does it all. The result
    is written to ``out`` [M, N] where that is given.
    """
    rows, cols = w.shape
    columns = columns_of(w.parts)
    y = empty_rows(x, x.shape[0], rows) if out is None else out
    dtype = decoded_dtype(x)
    with backend(name):
        chosen = select("qlinear", x.device)
        if x.shape[0] <= FUSED_ROWS[chosen].get(x.dtype, 0):
            _fused(x if columns is None else x.index_select(1, columns), w, bias, chosen, y)
            if low is not None:
                low.add_to(y)
            return y
        if low is None or columns is not None or dtype != x.dtype:
            wide = None
        x = x if columns is None else x.index_select(1, columns)
        tail = 0 if wide is None else wide.tail
        for begin, end in slabs(rows, cols + tail, dtype):
            to, part_bias = y[:, begin:end], None if bias is None else bias[begin:end]
            part_low = None if low is None else low.columns(begin, end)
            with w.slab((begin, end, 0, cols), dtype, tail) as part:
                if wide is not None and part_low is not None:
                    wide.fill(part, part_low)
                    product(wide.buffer, part.t(), None, part_bias, to)
                else:
                    product(x, part.to(x.dtype).t(), part_low, part_bias, to)
    return y


def input_gradient(
    dy: Tensor, w: Stored, name: str, low: LowRank | None = None, into: Tensor | None = None
) -> Tensor:
    """dY W + the low-rank product, added to ``into`` where it is given; dY [M, N] in any floating
    dtype.
    """
    rows, cols = w.shape
    columns = columns_of(w.parts)
    dx = empty_rows(dy, dy.shape[0], cols) if into is None or columns is not None else into
    with backend(name):
        parts = slabs(cols, rows, decoded_dtype(dy))
        dropped = low is not None and low.drop.seed is not None
        apart = columns is not None or (dropped and len(parts) > 1)
        for begin, end in parts:
            part_low = None if low is None or apart else low.columns(begin, end)
            with w.slab((0, rows, begin, end), decoded_dtype(dy)) as part:
                weight, to = part.to(dy.dtype), dx[:, begin:end]
                product(dy, weight, part_low, None, to, accumulate=dx is into)
    if columns is not None:
        dx = dx.index_select(1, columns.argsort())
        dx = dx if into is None else into.add_(dx)
    if apart and low is not None:
        low.add_to(dx)
    return dx


def scratch_shape(rows: int, cols: int, dtype: torch.dtype) -> tuple[int, int]:
    """The shape of what is decoded at once of a weight [rows, cols] cut into slabs of rows."""
    return slabs(rows, cols, dtype)[0][1], cols


def decoded_dtype(x: Tensor) -> torch.dtype:
    """What a weight is decoded in for a product with x."""
    return x.dtype if x.dtype in DTYPES else torch.float32


def _fused(x: Tensor, w: Stored, bias: Tensor | None, name: str, y: Tensor) -> None:
    if y.numel() == 0:
        return
    fmt = FORMATS[w.format]
    stored = named_parts(w.parts, fmt)
    tables = decode_tables(fmt, stored[3] is not None, x.device)
    apart = x.stride(1) == 1 and (x.shape[0] == 1 or x.stride(0) >= x.shape[1])
    x = x if apart else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    with device_guard(x):
        implementation("qlinear", name).qlinear(
            x, *stored, *tables, fmt.bits, w.shape, w.block_size, bias, y
        )
