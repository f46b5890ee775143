"""Quantize and dequantize a weight; layout and rules are in ``pyft.formats``.

Not differentiable: a quantized weight is frozen, and the gradient passes through the linear that
uses it.
"""

import torch
from torch import Tensor

from pyft.backend import backend, chosen, device_guard, implementation, select
from pyft.errors import UsageError
from pyft.formats import (
    BLOCK_SIZES,
    FORMATS,
    Format,
    absmax_format,
    code_table,
    midpoint_table,
    nested_blocks,
)
from pyft.op import Primitive
from pyft.quantized import QuantizedTensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def quantize(
    w: Tensor, format: str = "nf4", block_size: int = 64, double_quant: bool = True
) -> QuantizedTensor:
    """Quantize a weight in blocks of ``block_size`` consecutive elements.

    Args:
        w: the weight, any shape, fp32, bf16 or fp16; read, never written.
        format: a name in ``pyft.formats.FORMATS``.
        block_size: elements per absmax: 32, 64, ... 4096.
        double_quant: store absmax in 8 bits, 0.127 instead of 0.5 bits per weight at block size 64.

    Returns:
        A QuantizedTensor of w's shape, dtype and device.

    Raises:
        UsageError: unknown format, dtype or block size.

    Source: Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs (2023).
    """
    if format not in FORMATS:
        raise UsageError(f"quantize: format {format!r} is unknown; use one of {', '.join(FORMATS)}")
    if block_size not in BLOCK_SIZES:
        raise UsageError(
            f"quantize: block_size {block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}"
        )
    if w.dtype not in DTYPES or isinstance(w, QuantizedTensor):
        what = "already quantized" if isinstance(w, QuantizedTensor) else f"of dtype {w.dtype}"
        raise UsageError(
            f"quantize: the weight is {what}; pass a float32, bfloat16 or float16 tensor"
        )
    fmt = FORMATS[format]
    packed, absmax, nested, offset = _quantize(
        w.detach(), fmt.name, block_size, double_quant, chosen()
    )
    if not double_quant:
        nested = offset = None
    return QuantizedTensor(packed, absmax, nested, offset, format, block_size, w.shape, w.dtype)


@torch.no_grad()
def dequantize(
    q: QuantizedTensor, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """Decode a quantized weight; each element is rounded once.

    Args:
        q: the quantized weight.
        dtype: fp32, bf16 or fp16; q's own when neither it nor ``out`` is given.
        out: where to write, of q's shape; its rows may be further apart than their length (a slice
            of a wider scratch), its elements within a row are adjacent.

    Returns:
        ``out``, or a new tensor of q's shape.

    Raises:
        UsageError: a wrong dtype, shape or layout of ``out``.
    """
    dtype = dtype or (out.dtype if out is not None else q.dtype)
    if dtype not in DTYPES:
        raise UsageError(f"dequantize: dtype {dtype} is not one of float32, bfloat16, float16")
    if out is None:
        rows = q.shape[0] if q.dim() > 1 and q.numel() else 1
        stored = (q.packed, q.absmax, q.nested, q.offset, q.format.name, q.block_size)
        decoded: Tensor = _decode(*stored, rows, q.numel() // rows, dtype, chosen())
        return decoded.view(q.shape)
    if out.dtype != dtype or out.shape != q.shape or out.device != q.device:
        raise UsageError(
            f"dequantize: out is {out.dtype} {tuple(out.shape)} on {out.device}; "
            f"it must be {dtype} {tuple(q.shape)} on {q.device}"
        )
    into = _as_rows(out)
    if into is None:
        raise UsageError(
            f"dequantize: out has strides {out.stride()}; elements of a row must be adjacent"
        )
    dequantize_rows(q.parts(), q.format, q.block_size, (0, into.shape[0]), into.shape[0], into)
    return out


def _quantize_now(
    w: Tensor, format: str, block_size: int, double_quant: bool, name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stored tensors of w; nested and offset are empty without double quantization."""
    with backend(name):
        name = select("quantize", w.device)
    with device_guard(w):
        packed, absmax = _quantize4(w, FORMATS[format], block_size, name)
        if not double_quant:
            return packed, absmax, absmax.new_empty(0), absmax.new_empty(0)
        return packed, *_quantize_absmax(absmax, name)


def _fake_quantize(
    w: Tensor, format: str, block_size: int, double_quant: bool, name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    blocks = -(-w.numel() // block_size)
    packed = w.new_empty((w.numel() + 1) // 2, dtype=torch.uint8)
    absmax = w.new_empty(blocks, dtype=torch.uint8 if double_quant else torch.float32)
    nested = w.new_empty(nested_blocks(blocks) if double_quant else 0, dtype=torch.float32)
    return packed, absmax, nested, w.new_empty(() if double_quant else 0, dtype=torch.float32)


def _decode_now(
    packed: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    format: str,
    block_size: int,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    name: str,
) -> Tensor:
    """The whole weight as a new [rows, cols]."""
    out = torch.empty(rows, cols, dtype=dtype, device=packed.device)
    parts = [part for part in (packed, absmax, nested, offset) if part is not None]
    with backend(name):
        dequantize_rows(parts, FORMATS[format], block_size, (0, rows), rows, out)
    return out


def _fake_decode(
    packed: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    format: str,
    block_size: int,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    name: str,
) -> Tensor:
    return packed.new_empty(rows, cols, dtype=dtype)


_quantize = Primitive("quantize", _quantize_now, _fake_quantize)
_decode = Primitive("dequantize", _decode_now, _fake_decode)


def dequantize_rows(
    parts: list[Tensor],
    fmt: Format,
    block_size: int,
    rows: tuple[int, int],
    total_rows: int,
    out: Tensor,
) -> None:
    """Decode rows rows[0] to rows[1] of a weight [total_rows, K] into out, unchecked."""
    packed, absmax = parts[:2]
    nested, offset = parts[2:] if len(parts) == 4 else (None, None)
    name = select("quantize", out.device)
    kernels = implementation("quantize", name)
    if name == "reference":
        kernels.dequantize(packed, absmax, nested, offset, fmt, block_size, rows, out)
        return
    codes = code_table(fmt, out.device)
    absmax_codes = code_table(absmax_format(), out.device) if nested is not None else None
    inputs = (packed, absmax, nested, offset, codes, absmax_codes)
    with device_guard(out):
        kernels.dequantize4(*inputs, total_rows, out.shape[1], block_size, *rows, out)


def _quantize4(w: Tensor, fmt: Format, block_size: int, name: str) -> tuple[Tensor, Tensor]:
    kernels = implementation("quantize", name)
    if name == "reference":
        packed, absmax = kernels.quantize(w, fmt, block_size)
        return packed, absmax
    packed = torch.empty((w.numel() + 1) // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-w.numel() // block_size), dtype=torch.float32, device=w.device)
    midpoints = midpoint_table(fmt, w.device)
    kernels.quantize4(w.contiguous(), midpoints, fmt.zero_code, block_size, packed, absmax)
    return packed, absmax


def _quantize_absmax(absmax: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    kernels = implementation("quantize", name)
    if name == "reference":
        codes, nested, offset = kernels.quantize_absmax(absmax)
        return codes, nested, offset
    fmt = absmax_format()
    offset = absmax.double().sum().div(max(absmax.numel(), 1)).float()
    codes = torch.empty(absmax.numel(), dtype=torch.uint8, device=absmax.device)
    nested = torch.empty(nested_blocks(absmax.numel()), dtype=torch.float32, device=absmax.device)
    kernels.quantize_absmax(
        absmax, offset, midpoint_table(fmt, absmax.device), fmt.zero_code, codes, nested
    )
    return codes, nested, offset


def _as_rows(out: Tensor) -> Tensor | None:
    """``out`` as [rows, K] without a copy, K adjacent; None where its strides do not allow it."""
    if (
        out.dim() == 2
        and (out.shape[1] <= 1 or out.stride(1) == 1)
        and out.stride(0) >= out.shape[1]
    ):
        return out
    if not out.is_contiguous():
        return None
    return out.view(out.shape[0], -1) if out.dim() > 1 and out.numel() else out.view(1, -1)
