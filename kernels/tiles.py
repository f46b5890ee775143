"""Jit helpers that kernels share: quantized formats, as ``pyft.formats`` defines them; activations
and tanh; dropout from a seed.
"""

import triton
import triton.language as tl

# Elements whose codes are 4 or 8 aligned bytes, in rows that begin and end at multiples of it.
GROUP = 8

# Scales that share one nested scale.
NESTED_BLOCK = 256

INFINITY = tl.constexpr(float("inf"))
# fp32 numbers this large are whole: adding and taking it off rounds to even below 2^22.
WHOLE = tl.constexpr(1.5 * 2**23)

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
GELU_SLOPE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
GELU_CUBE = tl.constexpr(0.044715)
# Beyond, gelu_tanh is 0 or the identity in fp32, and a cube may be infinite.
GELU_END = tl.constexpr(16.0)

LOG2E = tl.constexpr(1.4426950408889634)
# tanh x = x + x^3 (T0 + T1 x^2 + ...) to 7e-8 of it, up to TANH_SMALL
TANH_SMALL = tl.constexpr(0.5)
T0 = tl.constexpr(-0.333331435918808)
T1 = tl.constexpr(0.13325878977775574)
T2 = tl.constexpr(-0.05304549261927605)
T3 = tl.constexpr(0.01724149100482464)


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


@triton.jit
def activate(g, ACTIVATION: tl.constexpr):
    """act(g) in fp32: "silu", "gelu", "gelu_tanh" or "relu2" of ``pyft.reference.glu``."""
    tl.static_assert(g.dtype == tl.float32)
    if ACTIVATION == "silu":
        y = g * tl.sigmoid(g)
    elif ACTIVATION == "gelu":
        y = g * (0.5 + 0.5 * tl.erf(g * SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        y = g * tl.sigmoid((g + g * g * g * GELU_CUBE) * GELU_SLOPE)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        positive = tl.where(g <= 0, 0.0, g)  # keeps NaN
        y = positive * positive
    return y


@triton.jit
def sigmoid_with_slope(x):
    """1 / (1 + exp(-x)) and its derivative, without a difference of numbers close to each other."""
    small = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + small)
    return tl.where(x >= 0, large, small * large), small * large * large


@triton.jit
def activate_with_slope(g, ACTIVATION: tl.constexpr):
    """act(g) and its derivative in fp32."""
    tl.static_assert(g.dtype == tl.float32)
    if ACTIVATION == "silu":
        share, share_slope = sigmoid_with_slope(g)
        slope = share + g * share_slope
        y = g * share
    elif ACTIVATION == "gelu":
        share = 0.5 + 0.5 * tl.erf(g * SQRT_HALF)
        slope = share + g * INV_SQRT_2PI * tl.exp(-0.5 * g * g)
        y = g * share
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh u) / 2 is the sigmoid of 2 u
        near = tl.where(tl.abs(g) > GELU_END, tl.where(g > 0, GELU_END, -GELU_END), g)
        square = near * near
        share, share_slope = sigmoid_with_slope(near * (1.0 + square * GELU_CUBE) * GELU_SLOPE)
        slope = share + share_slope * near * (1.0 + square * (3.0 * GELU_CUBE)) * GELU_SLOPE
        y = g * share
    else:
        tl.static_assert(ACTIVATION == "relu2")
        positive = tl.where(g <= 0, 0.0, g)
        slope = 2.0 * positive
        y = positive * positive
    return y, slope


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """Of fp32, to 1e-7 absolutely; PRECISE: of its size."""
    y = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2 * LOG2E)))
    if PRECISE:
        z = x * x
        y = tl.where(
            z < TANH_SMALL * TANH_SMALL, x + x * z * (T0 + z * (T1 + z * (T2 + z * T3))), y
        )
    return y


@triton.jit
def random_group(counter, seed):
    """The four uint32 words of int64 counters: ``pyft.reference.dropout.random_words``."""
    tl.static_assert(counter.dtype == tl.int64)
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    return tl.philox(seed, low, high, zero, zero)


@triton.jit
def random_tile(row, col, pitch, seed, COLS: tl.constexpr, GROUPED: tl.constexpr):
    """uint32 words of the elements row * pitch + col of rows [ROWS] and COLS columns from ``col``:
    int64 rows and first column. GROUPED, where pitch and col are multiples of 4, draws four words
    at once.
    """
    ROWS: tl.constexpr = row.shape[0]
    if GROUPED:
        offs_c = col // 4 + tl.arange(0, COLS // 4)
        first, second, third, fourth = random_group(
            row[:, None] * (pitch // 4) + offs_c[None, :], seed
        )
        even, odd = tl.join(first, third), tl.join(second, fourth)
        words = tl.join(even, odd).reshape(ROWS, COLS)
    else:
        element = row[:, None] * pitch + (col + tl.arange(0, COLS))[None, :]
        first, second, third, fourth = random_group(element // 4, seed)
        place = (element % 4).to(tl.int32)
        low = tl.where(place == 0, first, second)
        high = tl.where(place == 2, third, fourth)
        words = tl.where(place < 2, low, high)
    return words


@triton.jit
def keep_tile(row, col, pitch, seed, threshold, COLS: tl.constexpr, GROUPED: tl.constexpr):
    """Which elements of ``random_tile`` dropout keeps: words that are not below the threshold."""
    return random_tile(row, col, pitch, seed, COLS, GROUPED) >= tl.cast(threshold, tl.uint32)
