"""One step of AdamW, Lion or SGD with 8-bit states over many tensors.

The equations, their order and the coding of states are those of ``pyft.reference.optim``, bit for
bit: divisions and square roots are IEEE, and launches forbid the compiler to contract a product and
a sum. A program works on ROWS blocks of 256 elements of one tensor, which it finds by bisection in
the table of addresses; one call is one launch.

Bytes moved for each element: AdamW 16 with fp32 parameters and 10 with 16-bit ones, Lion and SGD 14
and 8. The maps and the encoder's first look-up, 13 KB, come from the cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from pyft.kernels import configs

ADAMW = tl.constexpr(0)
LION = tl.constexpr(1)
BLOCK = tl.constexpr(256)
INFINITY = tl.constexpr(0x7F800000)
SMALLEST = tl.constexpr(104 << 23)  # the bits of 2**-23, where buckets begin
BUCKETS = tl.constexpr((23 << 7) + 4)

OPTIM_ALIGN = configs.OPTIM.rows  # blocks a tensor is counted up to: a program has one tensor


@triton.jit
def magnitude_bits(x):
    """Bits of |x| as int32, whose order is that of |x|, infinity and NaN on top."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def encode_state(x, absmax, codes_ptr, starts_ptr, SIGNED: tl.constexpr):
    """uint8 codes of x [ROWS, 256] with its absmax [ROWS]."""
    scaled = tl.math.div_rn(x, tl.broadcast_to(absmax[:, None], x.shape))
    bits = scaled.to(tl.int32, bitcast=True)
    bucket = (tl.maximum(bits & 0x7FFFFFFF, SMALLEST) - SMALLEST) >> 16
    if SIGNED:
        bucket += tl.where(bits < 0, BUCKETS, 0)
    else:
        bucket += 2 * BUCKETS
    zeros = absmax[:, None] == 0
    code = tl.load(starts_ptr + tl.where(zeros, 0, bucket)).to(tl.int32)
    middle = tl.load(codes_ptr + (BLOCK if SIGNED else 3 * BLOCK) + code)
    code = tl.where(scaled > middle, code + 1, code)
    if not SIGNED:
        code = tl.where((x > 0) & (code == 0), 1, code)
    return tl.where(zeros, 127 if SIGNED else 0, code).to(tl.uint8)


@triton.jit
def load_state(
    state_ptr, absmax_ptr, block, element, n, codes_ptr,
    SIGNED: tl.constexpr, CODED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """A state as fp32 [ROWS, 256], 0 beyond its end."""
    if CODED:
        map_ptr = codes_ptr + (0 if SIGNED else 2 * BLOCK)
        if FULL:
            code = tl.load(state_ptr + element).to(tl.int32)
            absmax = tl.load(absmax_ptr + block)
        else:
            zero_code = 127 if SIGNED else 0
            code = tl.load(state_ptr + element, mask=element < n, other=zero_code).to(tl.int32)
            absmax = tl.load(absmax_ptr + block, mask=block * BLOCK < n, other=0.0)
        x = tl.load(map_ptr + code) * absmax[:, None]
    else:
        x = tl.load(state_ptr + element, mask=element < n, other=0.0)
    return x


@triton.jit
def store_state(
    x, bits, write, state_ptr, absmax_ptr, block, element, n, codes_ptr, starts_ptr,
    SIGNED: tl.constexpr, CODED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Write the blocks of x [ROWS, 256] that ``write`` [ROWS] names; bits: their absmax's."""
    mask = tl.broadcast_to(write[:, None], x.shape)
    if not FULL:
        mask = mask & (element < n)
    if not CODED:
        tl.store(state_ptr + element, x, mask=mask)
    else:
        absmax = bits.to(tl.float32, bitcast=True)
        absmax = tl.where(write, absmax, 0.0)
        code = encode_state(x, absmax, codes_ptr, starts_ptr, SIGNED)
        tl.store(state_ptr + element, code, mask=mask)
        tl.store(absmax_ptr + block, absmax, mask=write & (block * BLOCK < n))


@triton.jit
def update_blocks(
    param_ptr, grad_ptr, first_ptr, second_ptr, first_absmax_ptr, second_absmax_ptr, n, block,
    codes_ptr, starts_ptr, sign, beta1, rest1, beta2, rest2, keep, decay, step, eps,
    ALGORITHM: tl.constexpr, NESTEROV: tl.constexpr, CODED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Step the blocks ``block`` [ROWS] of one tensor; FULL: all their elements exist."""
    element = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [ROWS, 256]
    if FULL:
        param, grad = tl.load(param_ptr + element), tl.load(grad_ptr + element)
    else:
        param = tl.load(param_ptr + element, mask=element < n, other=0.0)
        grad = tl.load(grad_ptr + element, mask=element < n, other=0.0)
    p, g = param.to(tl.float32), grad.to(tl.float32) * sign
    m = load_state(first_ptr, first_absmax_ptr, block, element, n, codes_ptr, True, CODED, FULL)
    bits = tl.zeros([block.shape[0]], tl.int32)
    if ALGORITHM == ADAMW:
        v = load_state(
            second_ptr, second_absmax_ptr, block, element, n, codes_ptr, False, CODED, FULL
        )
        m = m * beta1 + g * rest1
        v = v * beta2 + (g * rest2) * g
        u = tl.math.div_rn(m, tl.math.sqrt_rn(v) + eps)
        bits = tl.max(magnitude_bits(v), axis=1)
    elif ALGORITHM == LION:
        c = m * beta1 + g * rest1
        u = tl.where(c > 0, 1.0, tl.where(c < 0, -1.0, 0.0))
        m = m * beta2 + g * rest2
    else:
        d = g + p * decay
        m = m * beta1 + d * rest1
        u = d + m * beta1 if NESTEROV else m
    m_bits = tl.max(magnitude_bits(m), axis=1)
    write = tl.maximum(m_bits, bits) < INFINITY  # [ROWS]
    p = p * keep - u * step
    mask = tl.broadcast_to(write[:, None], p.shape)
    if not FULL:
        mask = mask & (element < n)
    tl.store(param_ptr + element, p.to(param_ptr.dtype.element_ty), mask=mask)
    store_state(
        m, m_bits, write, first_ptr, first_absmax_ptr, block, element, n, codes_ptr, starts_ptr,
        True, CODED, FULL,
    )  # fmt: skip
    if ALGORITHM == ADAMW:
        store_state(
            v, bits, write, second_ptr, second_absmax_ptr, block, element, n, codes_ptr, starts_ptr,
            False, CODED, FULL,
        )  # fmt: skip


@triton.jit
def address(row_ptr, FIELD: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """One pointer of a row of the table."""
    pointer = tl.load(row_ptr + FIELD).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit(
    do_not_specialize=[
        "count", "sign", "beta1", "rest1", "beta2", "rest2", "keep", "decay", "step", "eps",
    ]
)  # fmt: skip
def optim_kernel(
    table_ptr, codes_ptr, starts_ptr, count,
    sign, beta1, rest1, beta2, rest2, keep, decay, step, eps,
    ALGORITHM: tl.constexpr, NESTEROV: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, PROBES: tl.constexpr,
):  # fmt: skip
    """Step blocks [pid * ROWS, pid * ROWS + ROWS) of the tensors in table [count, 8]."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    at = tl.zeros([], tl.int64)  # the last tensor that begins at or before ``first``
    for bit in tl.static_range(PROBES - 1, -1, -1):
        probe = at + (1 << bit)
        begin = tl.load(table_ptr + probe * 8 + 7, mask=probe < count, other=0)
        at = tl.where((probe < count) & (begin <= first), probe, at)
    row_ptr = table_ptr + at * 8
    n = tl.load(row_ptr + 6)
    block = first - tl.load(row_ptr + 7) + tl.arange(0, ROWS)  # [ROWS]
    param_ptr = address(row_ptr, 0, DTYPE, ALIGNED)
    grad_ptr = address(row_ptr, 1, DTYPE, ALIGNED)
    first_absmax_ptr = address(row_ptr, 4, tl.float32, ALIGNED)
    second_absmax_ptr = address(row_ptr, 5, tl.float32, ALIGNED)
    if tl.load(row_ptr + 4) == 0:
        update_blocks(
            param_ptr, grad_ptr, address(row_ptr, 2, tl.float32, ALIGNED),
            address(row_ptr, 3, tl.float32, ALIGNED), first_absmax_ptr, second_absmax_ptr, n, block,
            codes_ptr, starts_ptr, sign, beta1, rest1, beta2, rest2, keep, decay, step, eps,
            ALGORITHM, NESTEROV, False, False,
        )  # fmt: skip
    else:
        first_ptr = address(row_ptr, 2, tl.uint8, ALIGNED)
        second_ptr = address(row_ptr, 3, tl.uint8, ALIGNED)
        if (first - tl.load(row_ptr + 7) + ROWS) * BLOCK <= n:
            update_blocks(
                param_ptr, grad_ptr, first_ptr, second_ptr, first_absmax_ptr, second_absmax_ptr, n,
                block, codes_ptr, starts_ptr, sign, beta1, rest1, beta2, rest2, keep, decay, step,
                eps, ALGORITHM, NESTEROV, True, True,
            )  # fmt: skip
        else:
            update_blocks(
                param_ptr, grad_ptr, first_ptr, second_ptr, first_absmax_ptr, second_absmax_ptr, n,
                block, codes_ptr, starts_ptr, sign, beta1, rest1, beta2, rest2, keep, decay, step,
                eps, ALGORITHM, NESTEROV, True, False,
            )  # fmt: skip


def optim(
    table: Tensor,
    blocks: int,
    aligned: bool,
    on: Tensor,
    codes: Tensor,
    starts: Tensor,
    algorithm: int,
    nesterov: bool,
    *scalars: float,
    config: configs.Optim = configs.OPTIM,
) -> None:
    """One optimizer step over the tensors of ``table``, int64 [tensors, 8] rows of
    pyft_optim_tensor, whose parameters are like ``on``; ``blocks`` of 256 elements in all.
    """
    dtype = getattr(tl, str(on.dtype).removeprefix("torch."))
    optim_kernel[(triton.cdiv(blocks, config.rows),)](
        table, codes, starts, len(table), *scalars,
        ALGORITHM=algorithm, NESTEROV=nesterov, DTYPE=dtype, ALIGNED=aligned,
        ROWS=config.rows, PROBES=len(table).bit_length(),
        num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
