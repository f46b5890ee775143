"""Block-wise 4-bit quantization and its inverse; layout and rules are those of ``pyft.formats``.

    quantize     absmax[b] = max |x| over block b,  code = midpoints strictly below x / absmax[b]
    dequantize   x = fp32(codes[code]) * absmax[b], rounded once;
                 nested: absmax[b] = absmax_codes[c] * nested[b // 256] + offset

The bits are the reference's: divisions are IEEE, and launches forbid the compiler to contract a
product and a sum. Tensors are contiguous and on the current device, except that the rows of ``out``
may be any distance apart.
"""

import triton
import triton.language as tl
from torch import Tensor

from pyft.kernels import configs
from pyft.kernels.tiles import GROUP, NESTED_BLOCK, encode_block, load_absmax, pack4, unpack4


@triton.jit(do_not_specialize=["n", "zero_code"])
def quantize4_kernel(
    x_ptr,
    midpoints_ptr,
    packed_ptr,
    absmax_ptr,
    n,
    zero_code,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Code ROWS blocks: x [n] -> packed uint8 [ceil(n/2)], absmax fp32 [ceil(n/BLOCK)]."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    element = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [ROWS, BLOCK]
    x = tl.load(x_ptr + element, mask=element < n, other=0.0).to(tl.float32)
    code, absmax = encode_block(x, midpoints_ptr, zero_code, BITS=4)
    byte = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]  # [ROWS, BLOCK // 2]
    tl.store(packed_ptr + byte, pack4(code), mask=byte * 2 < n)
    tl.store(absmax_ptr + block, absmax, mask=block * BLOCK < n)


@triton.jit(do_not_specialize=["n", "zero_code"])
def quantize_absmax_kernel(
    x_ptr,
    offset_ptr,
    midpoints_ptr,
    codes_ptr,
    absmax_ptr,
    n,
    zero_code,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Code ROWS blocks of x - offset: x [n] -> codes uint8 [n], absmax [ceil(n/BLOCK)]."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    element = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [ROWS, BLOCK]
    mask = element < n
    x = tl.where(mask, tl.load(x_ptr + element, mask=mask, other=0.0) - tl.load(offset_ptr), 0.0)
    code, absmax = encode_block(x, midpoints_ptr, zero_code, BITS=8)
    tl.store(codes_ptr + element, code.to(tl.uint8), mask=mask)
    tl.store(absmax_ptr + block, absmax, mask=block * BLOCK < n)


@triton.jit(do_not_specialize=["first", "length", "tiles"])
def dequantize4_kernel(
    packed_ptr, absmax_ptr, nested_ptr, offset_ptr, codes_ptr, absmax_codes_ptr, out_ptr,
    first, length, tiles, stride_out,
    BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Decode GROUPS * GROUP elements of one run.

    Run r is ``length`` elements that begin at element first + r * length of the weight and go to
    out + r * stride_out. With GROUP > 1 runs begin and end at multiples of GROUP elements, so that
    each group lies in one block and has whole bytes.
    """
    tl.static_assert(BLOCK % GROUP == 0)
    pid = tl.program_id(0)
    run = (pid // tiles).to(tl.int64)
    offs_g = (pid % tiles).to(tl.int64) * GROUPS + tl.arange(
        0, GROUPS
    )  # [GROUPS], groups from the run's start
    mask_g = offs_g < length // GROUP
    group = (
        first // GROUP + run * (length // GROUP) + offs_g
    )  # [GROUPS], groups from the weight's start
    absmax = load_absmax(
        absmax_ptr,
        nested_ptr,
        offset_ptr,
        absmax_codes_ptr,
        group * GROUP // BLOCK,
        mask_g,
        NESTED_BLOCK,
    )
    if GROUP == 1:
        byte = tl.load(packed_ptr + group // 2, mask=mask_g, other=0).to(tl.int32)
        code = (byte >> (4 - 4 * (group % 2)).to(tl.int32) & 15)[:, None]  # [GROUPS, 1]
    else:
        offs_byte = (
            group[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
        )  # [GROUPS, GROUP // 2]
        code = unpack4(
            tl.load(packed_ptr + offs_byte, mask=mask_g[:, None], other=0)
        )  # [GROUPS, GROUP]
    value = tl.load(codes_ptr + code) * absmax[:, None]
    offs_out = run * stride_out + offs_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    tl.store(out_ptr + offs_out, value.to(out_ptr.dtype.element_ty), mask=mask_g[:, None])


def quantize4(
    x: Tensor,
    midpoints: Tensor,
    zero_code: int,
    block_size: int,
    packed: Tensor,
    absmax: Tensor,
    config: configs.Quantize = configs.QUANTIZE,
) -> None:
    """x [n] -> packed uint8 [ceil(n/2)], absmax fp32 [ceil(n/block_size)]; midpoints fp32 [15]."""
    if x.numel() == 0:
        return
    rows = max(1, config.tile // block_size)
    quantize4_kernel[(triton.cdiv(absmax.numel(), rows),)](
        x, midpoints, packed, absmax, x.numel(), zero_code,
        ROWS=rows, BLOCK=block_size, num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip


def quantize_absmax(
    x: Tensor,
    offset: Tensor,
    midpoints: Tensor,
    zero_code: int,
    codes: Tensor,
    absmax: Tensor,
    config: configs.Quantize = configs.QUANTIZE,
) -> None:
    """x fp32 [n] - offset -> codes uint8 [n], absmax fp32 [ceil(n/256)]; midpoints fp32 [255]."""
    if x.numel() == 0:
        return
    rows = max(1, config.tile // NESTED_BLOCK)
    quantize_absmax_kernel[(triton.cdiv(absmax.numel(), rows),)](
        x, offset, midpoints, codes, absmax, x.numel(), zero_code,
        ROWS=rows, BLOCK=NESTED_BLOCK, num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip


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
    config: configs.Dequantize = configs.DEQUANTIZE,
) -> None:
    """Rows [row_begin, row_end) of a [rows, cols] weight -> out [row_end - row_begin, cols].

    One launch. absmax is fp32, or uint8 when ``nested`` is given; ``out`` has adjacent columns.
    """
    runs, length, stride = row_end - row_begin, cols, out.stride(0)
    if runs * length == 0:
        return
    if runs == 1 or stride == cols:
        runs, length = 1, runs * length
    first = row_begin * cols
    group = GROUP if first % GROUP == 0 and length % GROUP == 0 else 1
    tiles = triton.cdiv(length, config.tile)
    dequantize4_kernel[(runs * tiles,)](
        packed, absmax, nested, offset, codes, absmax_codes, out, first, length, tiles, stride,
        BLOCK=block_size, NESTED_BLOCK=NESTED_BLOCK, GROUP=group, GROUPS=config.tile // group,
        num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
