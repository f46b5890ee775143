"""The native extensions on tensors: pointers, the current stream, the device guard. No checks of
user input here.
"""

import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from pyft.errors import UsageError

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ISAS = {"scalar": 0, "avx2": 1, "avx512": 2}


def _cpu() -> ModuleType:
    return importlib.import_module("pyft._cpu")


def _cuda() -> ModuleType:
    return importlib.import_module("pyft._cuda")


def isa() -> int:
    """The instruction set of CPU kernels: the best there is, or what PYFT_CPU_ISA names at the time
    of the call.
    """
    name = os.environ.get("PYFT_CPU_ISA")
    best: int = _cpu().best_isa()
    if not name:
        return best
    if name not in ISAS:
        raise UsageError(f"PYFT_CPU_ISA: {name!r} is not one of {', '.join(ISAS)}")
    if ISAS[name] > best:
        supported = ", ".join(isa for isa, level in ISAS.items() if level <= best)
        raise UsageError(f"PYFT_CPU_ISA: this CPU has no {name}; it has {supported}")
    return ISAS[name]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _launch(
    function: str, on: Tensor, arguments: tuple[object, ...], cpu_only: tuple[object, ...]
) -> None:
    """Call a kernel of the extension that serves ``on``'s device: CUDA ones end with a stream."""
    if not on.is_cuda:
        getattr(_cpu(), function)(*arguments, *cpu_only)
        return
    with torch.cuda.device(on.device):
        stream = torch.cuda.current_stream(on.device).cuda_stream
        getattr(_cuda(), function)(*arguments, stream)


def quantize4(
    x: Tensor, midpoints: Tensor, zero_code: int, block_size: int, packed: Tensor, absmax: Tensor
) -> None:
    """Contiguous x [n] -> packed uint8 [ceil(n/2)], absmax fp32 [ceil(n/block_size)]."""
    outputs = (packed.data_ptr(), absmax.data_ptr())
    arguments = (
        x.data_ptr(),
        DTYPES[x.dtype],
        x.numel(),
        block_size,
        midpoints.data_ptr(),
        zero_code,
        *outputs,
    )
    _launch("quantize4", x, arguments, () if x.is_cuda else (isa(), torch.get_num_threads()))


def quantize_absmax(
    x: Tensor, offset: Tensor, midpoints: Tensor, zero_code: int, codes: Tensor, absmax: Tensor
) -> None:
    """fp32 x [n] - offset [] -> codes uint8 [n], absmax fp32 [ceil(n/256)]."""
    inputs = (x.data_ptr(), x.numel(), offset.data_ptr(), midpoints.data_ptr(), zero_code)
    _launch("quantize_absmax", x, (*inputs, codes.data_ptr(), absmax.data_ptr()), ())


def dequantize4(
    packed: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    codes: Tensor,
    absmax_codes: Tensor | None,
    rows: int,
    cols: int,
    block_size: int,
    row_begin: int,
    row_end: int,
    out: Tensor,
) -> None:
    """Rows [row_begin, row_end) of a [rows, cols] weight -> out [row_end - row_begin, cols], of any
    row stride.
    """
    inputs = tuple(
        _address(tensor) for tensor in (packed, absmax, nested, offset, codes, absmax_codes)
    )
    output = (out.data_ptr(), out.stride(0), DTYPES[out.dtype])
    arguments = (*inputs, rows, cols, block_size, row_begin, row_end, *output)
    _launch("dequantize4", out, arguments, () if out.is_cuda else (isa(), torch.get_num_threads()))


def dropout(x: Tensor, seed: int, threshold: int, scale: float, out: Tensor) -> None:
    """Contiguous x of any shape -> out of the same shape and dtype."""
    key = seed & 0xFFFF_FFFF_FFFF_FFFF
    arguments = (x.data_ptr(), DTYPES[x.dtype], x.numel(), key, threshold, scale, out.data_ptr())
    _launch("dropout", x, arguments, (torch.get_num_threads(),))
