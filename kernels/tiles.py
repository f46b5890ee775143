"""Jit helpers that kernels share: codes of quantized formats, as laid out in ``pyft.formats``."""

import triton
import triton.language as tl

# Elements whose codes are one aligned 4-byte word, in rows that begin and end at multiples of it.
GROUP = 8

# absmax values that share one nested absmax.
NESTED_BLOCK = 256


@triton.jit
def magnitude_bits(x):
    """Bits of |x| as int32, whose order is that of |x| with NaN on top: a maximum keeps NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def encode(x, midpoints_ptr, BITS: tl.constexpr):
    """int32 codes of fp32 x: how many of 2**BITS - 1 ascending midpoints are strictly below it."""
    tl.static_assert(x.dtype == tl.float32)
    code = tl.zeros(x.shape, tl.int32)
    for bit in tl.static_range(BITS - 1, -1, -1):
        middle = tl.load(midpoints_ptr + code + ((1 << bit) - 1))
        code = tl.where(x > middle, code + (1 << bit), code)
    return code


@triton.jit
def encode_block(x, midpoints_ptr, zero_code, BITS: tl.constexpr):
    """Codes int32 [ROWS, BLOCK] and absmax fp32 [ROWS] of fp32 x [ROWS, BLOCK], a block a row."""
    bits = tl.max(magnitude_bits(x), axis=1)
    absmax = bits.to(tl.float32, bitcast=True)
    scaled = tl.math.div_rn(x, tl.broadcast_to(absmax[:, None], x.shape))
    return tl.where(bits[:, None] == 0, zero_code, encode(scaled, midpoints_ptr, BITS)), absmax


@triton.jit
def load_absmax(
    absmax_ptr, nested_ptr, offset_ptr, absmax_codes_ptr, block, mask, NESTED_BLOCK: tl.constexpr
):
    """absmax fp32 of the blocks in ``block``; nested_ptr is None where absmax is stored as fp32."""
    if nested_ptr is None:
        absmax = tl.load(absmax_ptr + block, mask=mask, other=0.0)
    else:
        code = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        nested = tl.load(nested_ptr + block // NESTED_BLOCK, mask=mask, other=0.0)
        absmax = tl.load(absmax_codes_ptr + code) * nested + tl.load(offset_ptr)
    return absmax


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
