"""Products with one thin side, of which the large input is read once: a rank is 1 to 512.

    project    out [M, R] = scale drop(x) Aᵀ    x [M, K], A [R, K]: S = drop(x) Aᵀ, dS = scale dY B
    reduce     out [R, K] = scale sᵀ drop(x)    s [M, R]: dA = dSᵀ drop(x), dBᵀ = scale Sᵀ dY

A program reads a block of rows (project) or of columns (reduce) of x once, for a rank of up to
BLOCK_R; programs of a higher rank's slices run beside each other, so that x comes from the cache
after the first. Where there are too few programs the sum over K (or M) is split into parts, a
number that depends on shapes alone, whose fp32 sums a second kernel adds in order: the same bits
twice.

Bytes moved: x once, the thin inputs from the cache, 4 R bytes for each part and row (or column).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyft.kernels import configs
from pyft.kernels.tiles import keep_tile

LARGEST_SUM = 8192  # fp32 sums a program holds
SUM_TILE = 1024
LEAST_BLOCKS = 4  # of K or M that a part has


@triton.jit
def load_dropped(
    x_ptr, rows, start, M, K, stride_xm, keep_scale, threshold, seed,
    DROPOUT: tl.constexpr, GROUPED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """drop(x) of int64 rows and BLOCK_K columns from ``start``, rounded to x's dtype; 0 outside."""
    offs_k = start + tl.arange(0, BLOCK_K)
    mask = (rows < M)[:, None] & (offs_k < K)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + offs_k[None, :], mask=mask, other=0.0)
    if DROPOUT:
        first = tl.cast(start, tl.int64)
        keep = keep_tile(rows, first, tl.cast(K, tl.int64), seed, threshold, BLOCK_K, GROUPED)
        x = tl.where(keep, x.to(tl.float32) * keep_scale, 0.0).to(x.dtype)
    return x


@triton.jit(do_not_specialize=["M", "threshold", "seed", "parts", "blocks"])
def project_kernel(
    x_ptr, a_ptr, out_ptr, M, K, parts, blocks, scale, keep_scale, threshold, seed,
    stride_xm, stride_ar, stride_ak, stride_op, stride_om,
    RANK: tl.constexpr, DROPOUT: tl.constexpr, GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Part p of out [parts, M, R] sums over ``blocks`` blocks of K."""
    RANKS: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    pid = tl.program_id(0)
    part = pid // RANKS % parts
    rows = (pid // RANKS // parts).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid % RANKS * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < RANK
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for block in range(part * blocks, tl.minimum((part + 1) * blocks, tl.cdiv(K, BLOCK_K))):
        start = block * BLOCK_K
        x = load_dropped(
            x_ptr, rows, start, M, K, stride_xm, keep_scale, threshold, seed,
            DROPOUT, GROUPED, BLOCK_K,
        )  # fmt: skip
        offs_k = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_K)
        a = tl.load(
            a_ptr + offs_r[None, :] * stride_ar + offs_k[:, None] * stride_ak,
            mask=mask_r[None, :] & (offs_k < K)[:, None],
            other=0.0,
        )  # [BLOCK_K, BLOCK_R]
        acc = tl.dot(x, a, acc, input_precision="ieee")
    out_ptrs = out_ptr + part.to(tl.int64) * stride_op
    out_ptrs += rows[:, None] * stride_om + offs_r[None, :]
    mask = (rows < M)[:, None] & mask_r[None, :]
    tl.store(out_ptrs, (acc * scale).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "threshold", "seed", "parts", "blocks"])
def reduce_kernel(
    s_ptr, x_ptr, out_ptr, M, K, parts, blocks, scale, keep_scale, threshold, seed,
    stride_sm, stride_xm, stride_op, stride_or, stride_ok,
    RANK: tl.constexpr, DROPOUT: tl.constexpr, GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Part p of out [parts, R, K] sums over ``blocks`` blocks of rows."""
    RANKS: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    pid = tl.program_id(0)
    part = pid // RANKS % parts
    start = pid // RANKS // parts * BLOCK_K
    offs_r = pid % RANKS * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < RANK
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for block in range(part * blocks, tl.minimum((part + 1) * blocks, tl.cdiv(M, BLOCK_M))):
        rows = tl.cast(block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        x = load_dropped(
            x_ptr, rows, start, M, K, stride_xm, keep_scale, threshold, seed,
            DROPOUT, GROUPED, BLOCK_K,
        )  # fmt: skip
        s = tl.load(
            s_ptr + rows[:, None] * stride_sm + offs_r[None, :],
            mask=(rows < M)[:, None] & mask_r[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_R]
        acc = tl.dot(tl.trans(s), x, acc, input_precision="ieee")
    offs_k = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_K)
    out_ptrs = out_ptr + part.to(tl.int64) * stride_op
    out_ptrs += offs_r.to(tl.int64)[:, None] * stride_or + offs_k[None, :] * stride_ok
    mask = mask_r[:, None] & (offs_k < K)[None, :]
    tl.store(out_ptrs, (acc * scale).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "parts"])
def sum_parts_kernel(
    parts_ptr, out_ptr, rows, cols, parts, scale, stride_or, stride_oc, TILE: tl.constexpr
):
    """fp32 [parts, rows, cols] -> out [rows, cols], scale times the sum in the order of parts."""
    element = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    count = tl.cast(rows, tl.int64) * cols
    mask = element < count
    total = tl.zeros((TILE,), tl.float32)
    for part in range(parts):
        total += tl.load(parts_ptr + part * count + element, mask=mask, other=0.0)
    out_ptrs = out_ptr + element // cols * stride_or + element % cols * stride_oc
    tl.store(out_ptrs, (total * scale).to(out_ptr.dtype.element_ty), mask=mask)


def project(
    x: Tensor,
    a: Tensor,
    scale: float,
    p_threshold: int,
    keep_scale: float,
    seed: int,
    out: Tensor,
    config: configs.Skinny | None = None,
) -> None:
    """out [M, R] = scale drop(x) aᵀ of x [M, K] and a [R, K], all of one dtype.

    x and out have adjacent columns and any row stride; a any two strides of which one is 1. An
    element (m, k) of x is zero where word m K + k of the seed is below p_threshold, else multiplied
    by keep_scale; p_threshold 0: no dropout.
    """
    (m, k), rank = x.shape, a.shape[0]
    if m * rank == 0:
        return
    config = config or default_config(x, configs.PROJECT)
    block_r = min(config.block_r, max(16, triton.next_power_of_2(rank)))
    block_m = min(config.block_m, LARGEST_SUM // block_r)
    tiles = triton.cdiv(m, block_m) * triton.cdiv(rank, block_r)
    parts, blocks = _split(tiles, triton.cdiv(k, config.block_k), config.programs)
    target = _partial_sums(parts, out)
    project_kernel[(tiles * parts,)](
        x, a, target, m, k, parts, blocks, scale if parts == 1 else 1.0, keep_scale,
        p_threshold, seed, x.stride(0), *a.stride(), m * rank, target.stride(-2),
        RANK=rank, DROPOUT=p_threshold > 0, GROUPED=k % 4 == 0, BLOCK_M=block_m,
        BLOCK_K=config.block_k, BLOCK_R=block_r, num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    if parts > 1:
        _sum_parts(target, scale, out)


def reduce(
    s: Tensor,
    x: Tensor,
    scale: float,
    p_threshold: int,
    keep_scale: float,
    seed: int,
    out: Tensor,
    config: configs.Skinny | None = None,
) -> None:
    """out [R, K] = scale sᵀ drop(x) of s [M, R] and x [M, K] of one dtype; out of any, with any two
    strides. s and x have adjacent columns and any row stride; dropout as in ``project``.
    """
    (m, k), rank = x.shape, s.shape[1]
    if k * rank == 0:
        return
    config = config or default_config(x, configs.REDUCE)
    block_r = min(config.block_r, max(16, triton.next_power_of_2(rank)))
    block_k = min(config.block_k, LARGEST_SUM // block_r)
    tiles = triton.cdiv(k, block_k) * triton.cdiv(rank, block_r)
    parts, blocks = _split(tiles, triton.cdiv(m, config.block_m), config.programs)
    target = _partial_sums(parts, out)
    reduce_kernel[(tiles * parts,)](
        s, x, target, m, k, parts, blocks, scale if parts == 1 else 1.0, keep_scale,
        p_threshold, seed, s.stride(0), x.stride(0), rank * k, *target.stride()[-2:],
        RANK=rank, DROPOUT=p_threshold > 0, GROUPED=k % 4 == 0, BLOCK_M=config.block_m,
        BLOCK_K=block_k, BLOCK_R=block_r, num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    if parts > 1:
        _sum_parts(target, scale, out)


def default_config(x: Tensor, matrix_units: configs.Skinny) -> configs.Skinny:
    """fp32 and sm_75 multiply without matrix units, an operand of them in registers."""
    nvidia = x.is_cuda and not torch.version.hip
    old = nvidia and torch.cuda.get_device_capability(x.device) < (8, 0)
    plain = old or x.dtype == torch.float32
    return configs.SKINNY_NO_MATRIX_UNITS if plain else matrix_units


def _split(tiles: int, blocks: int, programs: int) -> tuple[int, int]:
    """How many parts the blocks of the sum are in, and how many blocks a part has."""
    wanted = min(triton.cdiv(programs, tiles), triton.cdiv(blocks, LEAST_BLOCKS))
    each = max(1, triton.cdiv(blocks, max(1, wanted)))
    return max(1, triton.cdiv(blocks, each)), each


def _partial_sums(parts: int, out: Tensor) -> Tensor:
    if parts == 1:
        return out
    return torch.empty(parts, *out.shape, dtype=torch.float32, device=out.device)


def _sum_parts(sums: Tensor, scale: float, out: Tensor) -> None:
    parts, rows, cols = sums.shape
    sum_parts_kernel[(triton.cdiv(rows * cols, SUM_TILE),)](
        sums, out, rows, cols, parts, scale, *out.stride(), TILE=SUM_TILE
    )
