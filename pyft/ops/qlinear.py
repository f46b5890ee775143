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
from pyft.ops.quantize import DTYPES, decode_tables, dequantize_slab
from pyft.quantized import columns_of, named_parts
from pyft.scratch import Slab, decoded, slabs

# Up to how many rows the kernel that decodes on the fly is the faster one. The CPU's numbers were
# measured (AMD EPYC, AVX-512 with bf16 products); the GPUs' are what a memory-bound product allows,
# not measured yet.
FUSED_ROWS = {
    "cpu": {torch.float32: 64, torch.float16: 64, torch.bfloat16: 24},
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

    def slab(self, slab: Slab, dtype: torch.dtype) -> AbstractContextManager[Tensor]:
        """A context with rows slab[0] to slab[1], columns slab[2] to slab[3] decoded."""

        def decode(out: Tensor) -> None:
            arguments = (self.parts, FORMATS[self.format], self.block_size, self.shape)
            dequantize_slab(*arguments, slab, out)

        return decoded(self.parts, (self.format, self.block_size, slab), dtype, decode)


def forward(x: Tensor, w: Stored, bias: Tensor | None, name: str) -> Tensor:
    """x Wᵀ + bias; x [M, K] in any floating dtype, bias [N] of x's dtype or None."""
    rows, cols = w.shape
    columns = columns_of(w.parts)
    if columns is not None:
        x = x.index_select(1, columns)
    y = x.new_empty(x.shape[0], rows)
    with backend(name):
        chosen = select("qlinear", x.device)
        if x.shape[0] <= FUSED_ROWS[chosen].get(x.dtype, 0):
            _fused(x, w, bias, chosen, y)
            return y
        for begin, end in slabs(rows, cols, _decoded_dtype(x)):
            with w.slab((begin, end, 0, cols), _decoded_dtype(x)) as part:
                to, weight = y[:, begin:end], part.to(x.dtype).t()
                if bias is None:
                    torch.mm(x, weight, out=to)
                else:
                    torch.addmm(bias[begin:end], x, weight, out=to)
    return y


def input_gradient(dy: Tensor, w: Stored, name: str) -> Tensor:
    """dY W; dY [M, N] in any floating dtype."""
    rows, cols = w.shape
    dx = dy.new_empty(dy.shape[0], cols)
    with backend(name):
        for begin, end in slabs(cols, rows, _decoded_dtype(dy)):
            with w.slab((0, rows, begin, end), _decoded_dtype(dy)) as part:
                torch.mm(dy, part.to(dy.dtype), out=dx[:, begin:end])
    columns = columns_of(w.parts)
    return dx if columns is None else dx.index_select(1, columns.argsort())


def scratch_shape(rows: int, cols: int, dtype: torch.dtype) -> tuple[int, int]:
    """The shape of what is decoded at once of a weight [rows, cols] cut into slabs of rows."""
    return slabs(rows, cols, dtype)[0][1], cols


def _decoded_dtype(x: Tensor) -> torch.dtype:
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
