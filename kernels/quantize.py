"""Block-wise quantization and its inverse; layout and rules are those of ``pyft.formats``.

    quantize     scale[b] = span of block b / top,  code = order[thresholds below x / scale + zero]
    dequantize   x = (codes[code] - zero) * scale, rounded once; scale is stored as fp32, or
                 scale_codes[c], or nested: scale_codes[c] * nested[b // 256] + offset

The bits are the reference's: divisions are IEEE, and launches forbid the compiler to contract a
product and a sum. Tensors are contiguous and on the current device, except that the rows of ``out``
may be any distance apart.
"""

import triton
import triton.language as tl
from torch import Tensor

from pyft.kernels import configs
from pyft.kernels.tiles import (
    NESTED_BLOCK,
    encode,
    group_of,
    is_flat,
    load_code,
    load_scale,
    load_zero,
    pack4,
    reach_of,
    scale_of_reach,
    unpack4,
)


@triton.jit
def store_codes(packed_ptr, code, element, n, BITS: tl.constexpr):
    """Store codes [ROWS, COLS] of elements [ROWS, COLS], those below n; even ones start a byte."""
    if BITS == 8:
        tl.store(packed_ptr + element, code.to(tl.uint8), mask=element < n)
    else:
        first, _ = tl.split(element.reshape(element.shape[0], element.shape[1] // 2, 2))
        tl.store(packed_ptr + first // 2, pack4(code), mask=first < n)


@triton.jit(do_not_specialize=["n", "zero_code"])
def quantize_kernel(
    x_ptr, thresholds_ptr, order_ptr, packed_ptr, scales_ptr, zeros_ptr, n, zero_code, top,
    BITS: tl.constexpr, E8M0: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Code ROWS blocks of BLOCK elements."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    element = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [ROWS, BLOCK]
    mask = element < n
    x = tl.load(x_ptr + element, mask=mask, other=0.0).to(tl.float32)
    above, below = reach_of(x)
    scale, stored, zero = scale_of_reach(above, below, top, BITS, E8M0, zeros_ptr is not None)
    code = encode(x, scale, zero, thresholds_ptr, order_ptr, zero_code, mask, BITS)
    store_codes(packed_ptr, code, element, n, BITS)
    mask_b = block * BLOCK < n
    tl.store(scales_ptr + block, stored, mask=mask_b)
    if zeros_ptr is not None:
        tl.store(zeros_ptr + block, zero.to(tl.uint8), mask=mask_b)


@triton.jit(do_not_specialize=["cols", "zero_code"])
def quantize_row_kernel(
    x_ptr, thresholds_ptr, order_ptr, packed_ptr, scales_ptr, zeros_ptr, cols, zero_code, top,
    BITS: tl.constexpr, E8M0: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Code one block of ``cols`` elements, which it reads twice."""
    row = tl.program_id(0).to(tl.int64)
    first, end = row * cols, row * cols + cols
    above, below = tl.zeros((1,), tl.int32), tl.zeros((1,), tl.int32)
    for start in range(0, cols, TILE):
        element = first + start + tl.arange(0, TILE)[None, :]  # [1, TILE]
        x = tl.load(x_ptr + element, mask=element < end, other=0.0).to(tl.float32)
        higher, lower = reach_of(x)
        above, below = tl.maximum(above, higher), tl.maximum(below, lower)
    scale, stored, zero = scale_of_reach(above, below, top, BITS, E8M0, zeros_ptr is not None)
    for start in range(0, cols, TILE):
        element = first + start + tl.arange(0, TILE)[None, :]
        mask = element < end
        x = tl.load(x_ptr + element, mask=mask, other=0.0).to(tl.float32)
        code = encode(x, scale, zero, thresholds_ptr, order_ptr, zero_code, mask, BITS)
        store_codes(packed_ptr, code, element, end, BITS)
    one = row + tl.zeros((1,), tl.int64)
    tl.store(scales_ptr + one, stored)
    if zeros_ptr is not None:
        tl.store(zeros_ptr + one, zero.to(tl.uint8))


@triton.jit(do_not_specialize=["first", "pitch", "length", "tiles", "row"])
def dequantize_kernel(
    packed_ptr, scales_ptr, zeros_ptr, nested_ptr, offset_ptr, codes_ptr, scale_codes_ptr, out_ptr,
    first, pitch, length, tiles, row, stride_out,
    BITS: tl.constexpr, BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Decode GROUPS * GROUP elements of one run.

    Run r is ``length`` elements that begin at element first + r * pitch of the weight and go to
    out + r * stride_out. With BLOCK 0 it lies in block row + r. With GROUP > 1 runs begin and end
    at multiples of GROUP elements, so that each group lies in one block and has whole bytes.
    """
    tl.static_assert(BLOCK % GROUP == 0)
    pid = tl.program_id(0)
    run = (pid // tiles).to(tl.int64)
    # [GROUPS], groups from the run's start
    offs_g = (pid % tiles).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    mask_g = offs_g < length // GROUP
    group = first // GROUP + run * (pitch // GROUP) + offs_g  # groups from the weight's start
    block = row + run + tl.zeros_like(offs_g) if BLOCK == 0 else group * GROUP // BLOCK
    scale = load_scale(
        scales_ptr, nested_ptr, offset_ptr, scale_codes_ptr, block, mask_g, NESTED_BLOCK
    )
    zero = load_zero(zeros_ptr, block, mask_g)
    if BITS == 4 and GROUP > 1:
        # [GROUPS, GROUP // 2]
        offs_byte = group[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
        byte = tl.load(packed_ptr + offs_byte, mask=mask_g[:, None], other=0)
        code = unpack4(byte)  # [GROUPS, GROUP]
    else:
        element = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        code = load_code(packed_ptr, element, mask_g[:, None], BITS)
    value = (tl.load(codes_ptr + code) - zero[:, None]) * scale[:, None]
    offs_out = run * stride_out + offs_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    tl.store(out_ptr + offs_out, value.to(out_ptr.dtype.element_ty), mask=mask_g[:, None])


def quantize(
    x: Tensor,
    thresholds: Tensor,
    order: Tensor,
    zero_code: int,
    top: float,
    e8m0: bool,
    bits: int,
    block_size: int,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    config: configs.Quantize = configs.QUANTIZE,
) -> None:
    """x [n] -> packed uint8 [ceil(n * bits / 8)], scales and zeros [blocks]."""
    n = x.numel()
    if n == 0:
        return
    tensors = (x, thresholds, order, packed, scales, zeros)
    if is_flat(block_size):
        rows = max(1, config.tile // block_size)
        quantize_kernel[(triton.cdiv(scales.numel(), rows),)](
            *tensors, n, zero_code, top, BITS=bits, E8M0=e8m0, ROWS=rows, BLOCK=block_size,
            num_warps=config.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    else:
        quantize_row_kernel[(scales.numel(),)](
            *tensors, block_size, zero_code, top, BITS=bits, E8M0=e8m0, TILE=config.tile,
            num_warps=config.num_warps, enable_fp_fusion=False,
        )  # fmt: skip


def dequantize(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    nested: Tensor | None,
    offset: Tensor | None,
    codes: Tensor,
    scale_codes: Tensor | None,
    bits: int,
    shape: tuple[int, int],
    block_size: int,
    slab: tuple[int, int, int, int],
    out: Tensor,
    config: configs.Dequantize = configs.DEQUANTIZE,
) -> None:
    """Rows slab[0] to slab[1], columns slab[2] to slab[3] of a weight of ``shape`` -> out, of any
    row stride and adjacent columns; one launch.
    """
    row, col, pitch = slab[0], slab[2], shape[1]
    runs, length, stride = slab[1] - row, slab[3] - col, out.stride(0)
    if runs * length == 0:
        return
    flat = is_flat(block_size)
    if flat and length == pitch and (runs == 1 or stride == length):
        runs, length = 1, runs * length
    first = row * pitch + col
    group = group_of(first, length, pitch if runs > 1 else 0)
    tiles = triton.cdiv(length, config.tile)
    dequantize_kernel[(runs * tiles,)](
        packed, scales, zeros, nested, offset, codes, scale_codes, out,
        first, pitch, length, tiles, row, stride,
        BITS=bits, BLOCK=block_size if flat else 0, NESTED_BLOCK=NESTED_BLOCK, GROUP=group,
        GROUPS=config.tile // group, num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
