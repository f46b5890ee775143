"""The vendor's matmul, in fp32 where a CPU has none for 16 bits.

    out = scale a b + bias, or out += scale a b          a [M, K]   b [K, N]   out [M, N]

Without AVX-512 (bf16) or its fp16 instructions torch multiplies 16-bit matrices on a CPU in plain
loops, up to a hundred times slower than fp32. There blocks of both are widened and multiplied in
fp32, summed in fp32 and rounded once; three blocks exist at a time, ``3 * 4 * BLOCK²`` bytes.
"""

from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

BLOCK = 256
# Products of fewer numbers are done in the loops before a block is widened.
FEW = 2**18


@cache
def has_matmul(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a dtype by instructions of its own."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def mm(
    a: Tensor,
    b: Tensor,
    out: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    accumulate: bool = False,
) -> Tensor:
    """``out``, or a fresh one; all of one dtype and of any strides."""
    if out is None:
        out = a.new_empty(a.shape[0], b.shape[1])
    if _is_slow(a, b):
        _widened(a, b, out, bias, scale, accumulate)
    elif accumulate:
        out.addmm_(a, b, alpha=scale)
        if bias is not None:
            out.add_(bias)
    elif bias is not None:
        torch.addmm(bias, a, b, alpha=scale, out=out)
    elif scale == 1.0:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(out, a, b, beta=0, alpha=scale, out=out)
    return out


def _is_slow(a: Tensor, b: Tensor) -> bool:
    return a.is_cpu and not has_matmul(a.dtype) and a.numel() * b.shape[1] >= FEW


def _widened(
    a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, scale: float, accumulate: bool
) -> None:
    (m, k), n = a.shape, b.shape[1]
    if isinstance(a, FakeTensor):  # a traced peak sees a block of each
        m, k, n = min(m, BLOCK), min(k, BLOCK), min(n, BLOCK)
    for row in range(0, m, BLOCK):
        for column in range(0, n, BLOCK):
            rows, columns = slice(row, row + BLOCK), slice(column, column + BLOCK)
            into = out[rows, columns]
            total = into.new_zeros(into.shape, dtype=torch.float32)
            for begin in range(0, k, BLOCK):
                inner = slice(begin, begin + BLOCK)
                total.addmm_(a[rows, inner].float(), b[inner, columns].float())
            total.mul_(scale)
            if bias is not None:
                total.add_(bias[columns])
            into.copy_(total.add_(into) if accumulate else total)
