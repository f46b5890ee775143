"""Jit helpers that kernels share: quantized formats, as ``pyft.formats`` defines them."""

import triton
import triton.language as tl

# Elements whose codes are 4 or 8 aligned bytes, in rows that begin and end at multiples of it.
GROUP = 8

# Scales that share one nested scale.
NESTED_BLOCK = 256

INFINITY = tl.constexpr(float("inf"))
# fp32 numbers this large are whole: adding and taking it off rounds to even below 2^22.
WHOLE = tl.constexpr(1.5 * 2**23)


def group_of(*lengths: int) -> int:
    """``GROUP`` where all lengths are multiples of it, else 1."""
    return GROUP if all(length % GROUP == 0 for length in lengths) else 1


def is_flat(block_size: int) -> bool:
    """Whether blocks of this size are cut from the flattened weight; otherwise each is a row."""
    return 32 <= block_size <= 4096 and block_size & (block_size - 1) == 0


@triton.jit
def level_of(x, thresholds_ptr, BITS: tl.constexpr):
    """int32, how many of 2**BITS - 1 ascending thresholds are strictly below fp32 x; 0 for NaN."""
    tl.static_assert(x.dtype == tl.float32)
    level = tl.zeros(x.shape, tl.int32)
    for bit in tl.static_range(BITS - 1, -1, -1):
        middle = tl.load(thresholds_ptr + level + ((1 << bit) - 1))
        level = tl.where(x > middle, level + (1 << bit), level)
    return level


@triton.jit
def reach_of(x):
    """How far fp32 x [ROWS, COLS] reaches above and below 0, a row at a time: int32 bits of |x|.

    Their order is that of |x| with NaN on top, so that a maximum keeps NaN.
    """
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(tl.where(x <= 0, 0, bits), axis=1), tl.max(tl.where(x >= 0, 0, bits), axis=1)


@triton.jit
def scale_of_reach(above, below, top, BITS: tl.constexpr, E8M0: tl.constexpr, ZEROS: tl.constexpr):
    """Of blocks with this reach: the scale in fp32, as it is stored, and the zero point in fp32."""
    if ZEROS:
        span = above.to(tl.float32, bitcast=True) + below.to(tl.float32, bitcast=True)
    else:
        span = tl.maximum(above, below).to(tl.float32, bitcast=True)
    scale = tl.math.div_rn(span, tl.zeros_like(span) + top)
    stored = scale
    if E8M0:
        exponent = scale.to(tl.int32, bitcast=True) >> 23 & 255
        bits = tl.where(exponent == 0, 0x00400000, exponent << 23)
        scale = tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
        stored = exponent.to(tl.uint8)
    zero = tl.zeros_like(scale)
    if ZEROS:
        zero = tl.math.div_rn(below.to(tl.float32, bitcast=True), scale)
        # infinite and NaN become 0
        zero = tl.where(zero < INFINITY, tl.minimum(zero, 2**BITS - 1), 0.0)
        zero = (zero + WHOLE) - WHOLE
    return scale, stored, zero


@triton.jit
def encode(x, scale, zero, thresholds_ptr, order_ptr, zero_code, mask, BITS: tl.constexpr):
    """int32 codes of fp32 x [ROWS, COLS], scale and zero [ROWS]; the code of 0 outside the mask."""
    scale = tl.broadcast_to(scale[:, None], x.shape)
    level = level_of(tl.math.div_rn(x, scale) + zero[:, None], thresholds_ptr, BITS)
    code = tl.load(order_ptr + level).to(tl.int32)
    return tl.where((scale == 0) | (mask == 0), zero_code, code)


@triton.jit
def load_scale(
    scales_ptr, nested_ptr, offset_ptr, scale_codes_ptr, block, mask, NESTED_BLOCK: tl.constexpr
):
    """fp32 scales of blocks; scale_codes_ptr is None where they are stored as fp32."""
    if scale_codes_ptr is None:
        scale = tl.load(scales_ptr + block, mask=mask, other=0.0)
    else:
        code = tl.load(scales_ptr + block, mask=mask, other=0).to(tl.int32)
        scale = tl.load(scale_codes_ptr + code)
        if nested_ptr is not None:
            nested = tl.load(nested_ptr + block // NESTED_BLOCK, mask=mask, other=0.0)
            scale = scale * nested + tl.load(offset_ptr)
    return scale


@triton.jit
def load_zero(zeros_ptr, block, mask):
    """fp32 zero points of blocks; all 0 where zeros_ptr is None."""
    if zeros_ptr is None:
        zero = tl.zeros(block.shape, tl.float32)
    else:
        zero = tl.load(zeros_ptr + block, mask=mask, other=0).to(tl.float32)
    return zero


@triton.jit
def load_code(packed_ptr, element, mask, BITS: tl.constexpr):
    """int32 codes of elements anywhere."""
    if BITS == 8:
        code = tl.load(packed_ptr + element, mask=mask, other=0).to(tl.int32)
    else:
        byte = tl.load(packed_ptr + element // 2, mask=mask, other=0).to(tl.int32)
        code = byte >> (4 - 4 * (element % 2)).to(tl.int32) & 15
    return code


@triton.jit
def unpack4(packed):
    """int32 codes [ROWS, 2 * BYTES] of uint8 [ROWS, BYTES], the high nibble first."""
    tl.static_assert(packed.dtype == tl.uint8)
    word = packed.to(tl.int32)
    return tl.join(word >> 4, word & 15).reshape(packed.shape[0], 2 * packed.shape[1])


@triton.jit
def pack4(code):
    """uint8 [ROWS, COLS // 2] of int32 codes [ROWS, COLS]: the inverse of ``unpack4``."""
    high, low = tl.split(code.reshape(code.shape[0], code.shape[1] // 2, 2))
    return (high << 4 | low).to(tl.uint8)
