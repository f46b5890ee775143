"""Quantize and dequantize a weight; layout and rules are in ``pyft.formats``.

Not differentiable: a quantized weight is frozen, and the gradient passes through the linear that
uses it.
"""

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pyft.backend import (
    backend,
    chosen,
    device_guard,
    implementation,
    large_empty,
    select,
)
from pyft.errors import UsageError
from pyft.formats import (
    FORMATS,
    NESTED_BLOCK,
    ROW,
    SCALE_FORMAT,
    Format,
    blocks_of,
    code_table,
    e8m0_table,
    order_table,
    scale_offset,
    threshold_table,
)
from pyft.op import Primitive, plain
from pyft.quantized import QuantizedTensor, columns_of, named_parts

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def quantize(
    w: Tensor,
    format: str = "nf4",
    block_size: int | str | None = None,
    double_quant: bool | None = None,
) -> QuantizedTensor:
    """Quantize a weight in blocks of consecutive elements of its rows.

    Args:
        w: the weight, any shape (rows are its first dimension), fp32, bf16 or fp16; read, never
            written. Infinities and NaN are kept as far as the block they are in can: see
            ``pyft.formats``.
        format: a name in ``pyft.formats.FORMATS``.
        block_size: elements per scale: 32, 64, ... 4096, or "row" for one scale a row; None takes
            the format's own.
        double_quant: store the scales in 8 bits, 0.127 instead of 0.5 bits per weight at block size
            64; None takes the format's own (yes for nf4 and fp4).

    Returns:
        A QuantizedTensor of w's shape, dtype and device.

    Raises:
        UsageError: unknown format, dtype or block size, scales that cannot be quantized.

    Source: see ``pyft.formats``.
    """
    fmt, size, nest = check_format("quantize", format, block_size, double_quant)
    if not isinstance(w, Tensor):
        raise UsageError(f"quantize: the weight is a {type(w).__name__}; pass a tensor")
    if w.dtype not in DTYPES or isinstance(w, QuantizedTensor):
        what = "already quantized" if isinstance(w, QuantizedTensor) else f"of dtype {w.dtype}"
        raise UsageError(
            f"quantize: the weight is {what}; pass a float32, bfloat16 or float16 tensor"
        )
    cols = rows_and_columns(w.shape)[1]
    if size == ROW:
        if fmt.bits == 4 and cols % 2:
            raise UsageError(
                f"quantize: rows of {cols} elements have no whole number of bytes in {format}; "
                "use a block_size of 32, 64, ... 4096"
            )
        size = cols or NESTED_BLOCK
    stored = _quantize(w.detach(), fmt.name, size, nest, chosen())
    parts = [part for part, there in zip(stored, _present(fmt, nest), strict=True) if there]
    return QuantizedTensor(parts, format, size, w.shape, w.dtype)


def check_format(
    where: str, format: str, block_size: int | str | None, double_quant: bool | None
) -> tuple[Format, int, bool]:
    """The format, its block size (``ROW`` for rows) and whether scales are quantized; UsageError
    names what is wrong.
    """
    if not isinstance(format, str) or format not in FORMATS:
        raise UsageError(f"{where}: format {format!r} is unknown; use one of {', '.join(FORMATS)}")
    fmt = FORMATS[format]
    if block_size is None:
        size = fmt.block_size
    elif block_size == "row" and not fmt.e8m0:
        size = ROW
    elif type(block_size) is int and block_size in fmt.block_sizes:
        size = block_size
    else:
        sizes = ", ".join(map(str, fmt.block_sizes))
        raise UsageError(
            f"{where}: block_size {block_size!r} is not one {format} can have: {sizes}"
            + ("" if fmt.e8m0 else ', "row"')
        )
    if double_quant and fmt.e8m0:
        raise UsageError(
            f"{where}: the scales of {format} are 8 bits already; leave double_quant out"
        )
    return fmt, size, fmt.double_quant if double_quant is None else double_quant


def rows_and_columns(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """A weight of this shape as a matrix: its first dimension, and all the others."""
    numel = torch.Size(shape).numel()
    rows = shape[0] if len(shape) > 1 and numel else 1
    return rows, numel // rows


def _present(fmt: Format, double_quant: bool) -> tuple[bool, ...]:
    return True, True, fmt.zero_points, double_quant, double_quant


@torch.no_grad()
def dequantize(
    q: QuantizedTensor, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """Decode a quantized weight; each element is rounded once.

    Args:
        q: the quantized weight.
        dtype: fp32, bf16 or fp16; q's own when neither it nor ``out`` is given.
        out: where to write, of q's shape; the rows of a matrix may be further apart than their
            length (a slice of a wider scratch), other shapes are contiguous.

    Returns:
        ``out``, or a new tensor of q's shape.

    Raises:
        UsageError: a wrong dtype, shape or layout of ``out``.
    """
    dtype = dtype or (out.dtype if out is not None else q.dtype)
    if dtype not in DTYPES:
        raise UsageError(f"dequantize: dtype {dtype} is not one of float32, bfloat16, float16")
    shape = rows_and_columns(q.shape)
    if out is None:
        stored = (q.parts(), q.format.name, q.block_size)
        decoded: Tensor = _decode(*stored, *shape, dtype, chosen())
        return decoded.view(q.shape)
    if out.dtype != dtype or out.shape != q.shape or out.device != q.device:
        raise UsageError(
            f"dequantize: out is {out.dtype} {tuple(out.shape)} on {out.device}; "
            f"it must be {dtype} {tuple(q.shape)} on {q.device}"
        )
    if q.columns is not None or not plain((out, q.parts())):
        return out.copy_(dequantize(q, dtype))
    into = _as_rows(out)
    if into is None:
        raise UsageError(
            f"dequantize: out has strides {out.stride()}; only the rows of a matrix may be apart"
        )
    dequantize_slab(q.parts(), q.format, q.block_size, shape, (0, shape[0], 0, shape[1]), into)
    if not out.is_inference():
        increment_version(out)  # autograd may have saved what was there
    return out


def _quantize_now(
    w: Tensor, format: str, block_size: int, double_quant: bool, name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """packed, scales, zeros, nested and offset; those the format does without are empty."""
    with backend(name):
        name = select("quantize", w.device)
    with device_guard(w):
        packed, scales, zeros = _blockwise(w, FORMATS[format], block_size, name)
        zeros = scales.new_empty(0) if zeros is None else zeros
        if not double_quant:
            return packed, scales, zeros, scales.new_empty(0), scales.new_empty(0)
        offset = scale_offset(scales)
        codes, nested, _ = _blockwise(scales - offset, SCALE_FORMAT, NESTED_BLOCK, name)
        return packed, codes, zeros, nested, offset


def _fake_quantize(
    w: Tensor, format: str, block_size: int, double_quant: bool, name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    fmt, n = FORMATS[format], w.numel()
    blocks = blocks_of(n, block_size)
    byte_scales = fmt.e8m0 or double_quant
    packed = w.new_empty((n * fmt.bits + 7) // 8, dtype=torch.uint8)
    scales = w.new_empty(blocks, dtype=torch.uint8 if byte_scales else torch.float32)
    zeros = w.new_empty(blocks if fmt.zero_points else 0, dtype=torch.uint8)
    nested = w.new_empty(blocks_of(blocks, NESTED_BLOCK) if double_quant else 0).float()
    return packed, scales, zeros, nested, w.new_empty(() if double_quant else 0).float()


def _decode_now(
    parts: list[Tensor],
    format: str,
    block_size: int,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    name: str,
) -> Tensor:
    """The whole weight as a new [rows, cols]."""
    out = large_empty((rows, cols), dtype, parts[0].device)
    with backend(name):
        slab = (0, rows, 0, cols)
        dequantize_slab(parts, FORMATS[format], block_size, (rows, cols), slab, out)
    columns = columns_of(parts)
    return out if columns is None else out.index_select(1, columns.argsort())


def _fake_decode(
    parts: list[Tensor],
    format: str,
    block_size: int,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    name: str,
) -> Tensor:
    return parts[0].new_empty(rows, cols, dtype=dtype)


_quantize = Primitive("quantize", _quantize_now, _fake_quantize)
_decode = Primitive("dequantize", _decode_now, _fake_decode)


def dequantize_slab(
    parts: list[Tensor],
    fmt: Format,
    block_size: int,
    shape: tuple[int, int],
    slab: tuple[int, int, int, int],
    out: Tensor,
) -> None:
    """Decode rows slab[0] to slab[1], columns slab[2] to slab[3] of a weight of ``shape`` into out,
    whose columns are adjacent; unchecked. Columns are in the order they are stored in.
    """
    if out.numel() == 0:
        return
    stored = named_parts(parts, fmt)
    name = select("quantize", out.device)
    kernels = implementation("quantize", name)
    if name == "reference":
        kernels.dequantize(*stored, fmt, block_size, shape, slab, out)
        return
    tables = decode_tables(fmt, stored[3] is not None, out.device)
    with device_guard(out):
        kernels.dequantize(*stored, *tables, fmt.bits, shape, block_size, slab, out)


def decode_tables(fmt: Format, nested: bool, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """What kernels decode with: the codes fp32 [2**bits], and the scales' codes fp32 [256]."""
    codes = code_table(fmt, device)
    if fmt.e8m0:
        return codes, e8m0_table(device)
    return codes, code_table(SCALE_FORMAT, device) if nested else None


def _blockwise(
    x: Tensor, fmt: Format, block_size: int, name: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    kernels = implementation("quantize", name)
    if name == "reference":
        packed, scales, zeros = kernels.quantize(x, fmt, block_size)
        return packed, scales, zeros
    blocks, device = blocks_of(x.numel(), block_size), x.device
    packed = large_empty(((x.numel() * fmt.bits + 7) // 8,), torch.uint8, device)
    scale_dtype = torch.uint8 if fmt.e8m0 else torch.float32
    scales = torch.empty(blocks, dtype=scale_dtype, device=device)
    zeros = torch.empty(blocks, dtype=torch.uint8, device=device) if fmt.zero_points else None
    coding = (threshold_table(fmt, device), order_table(fmt, device), fmt.zero_code, fmt.top)
    kernels.quantize(x.contiguous(), *coding, fmt.e8m0, fmt.bits, block_size, packed, scales, zeros)
    return packed, scales, zeros


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
