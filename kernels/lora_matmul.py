"""A matmul with the low-rank product inside, for inputs that are not in a buffer with the product's
factor as its tail.

    out = x w + scale drop(s b) + bias        x [M, K], w [K, N], s [M, R], b [R, N]

forward: w = Wᵀ, s = drop(x) Aᵀ, b = Bᵀ without dropout here; backward: x = dY, w = W, s = scale
dY B, b = A, with the forward's mask over dX [M, N]. The low-rank product comes first, into the
accumulator that the main loop goes on with, so it costs R / K of the matmul and no second
accumulator. Bytes moved: those of the matmul, and R (M + N) elements for each row and column of
tiles.

One kernel: a program has one tile of the output, in groups that share rows of x and columns of w
in the L2 cache, or goes through every PROGRAMS-th tile (persistent); x and w are read through
pointers or through tensor descriptors (TMA).
"""

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pyft.kernels import configs
from pyft.kernels.tiles import keep_tile

TMA_ALIGN = 16  # bytes, of addresses and strides
INTERPRETED_PROGRAMS = 2  # of a persistent launch where there is no GPU


@triton.jit
def low_rank_tile(
    s_ptr, b_ptr, offs_m, offs_n, mask_n, scale, stride_sm, stride_br, stride_bn,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """scale (s b) of one tile in fp32 [BLOCK_M, BLOCK_N]."""
    acc = tl.zeros((offs_m.shape[0], offs_n.shape[0]), tl.float32)
    for start in tl.static_range(0, RANK, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        mask_r = offs_r < RANK
        s = tl.load(
            s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :], mask=mask_r[None, :], other=0.0
        )
        b = tl.load(
            b_ptr + offs_r[:, None] * stride_br + offs_n[None, :] * stride_bn,
            mask=mask_r[:, None] & mask_n[None, :],
            other=0.0,
        )
        acc = tl.dot(s, b, acc, input_precision="ieee")
    return acc * scale


@triton.jit
def output_tile(
    tile, x, w, s_ptr, b_ptr, bias_ptr, out_ptr, M, N, K, scale, keep_scale, threshold, seed,
    stride_xm, stride_wk, stride_wn, stride_sm, stride_br, stride_bn, stride_om,
    RANK: tl.constexpr, DROPOUT: tl.constexpr, GROUPED: tl.constexpr, EVEN_K: tl.constexpr,
    TMA: tl.constexpr, ALONG_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Compute and store one tile. Rows beyond M repeat the last one and are not stored."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_m = tile // (GROUP_M * tiles_n) * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    inside = tile % (GROUP_M * tiles_n)
    start_m = (first_m + inside % group_m) * BLOCK_M
    start_n = inside // group_m * BLOCK_N
    rows = start_m.to(tl.int64) + tl.arange(0, BLOCK_M)
    offs_m = tl.minimum(rows, M - 1)
    offs_n = start_n.to(tl.int64) + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N

    acc = low_rank_tile(
        s_ptr, b_ptr, offs_m, offs_n, mask_n, scale, stride_sm, stride_br, stride_bn, RANK, BLOCK_R
    )
    if DROPOUT:
        keep = keep_tile(rows, start_n.to(tl.int64), N, seed, threshold, BLOCK_N, GROUPED)
        acc = tl.where(keep, acc * keep_scale, 0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]

    if TMA:
        for start in range(0, K, BLOCK_K):
            x_tile = x.load([start_m, start])
            w_tile = w.load([start_n, start]).T if ALONG_K else w.load([start, start_n])
            acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
    else:
        offs_k = tl.arange(0, BLOCK_K)
        x_ptrs = x + offs_m[:, None] * stride_xm + offs_k[None, :]
        w_ptrs = w + offs_k.to(tl.int64)[:, None] * stride_wk + offs_n[None, :] * stride_wn
        for start in range(0, K, BLOCK_K):
            if EVEN_K:
                x_tile = tl.load(x_ptrs)
                w_tile = tl.load(w_ptrs, mask=mask_n[None, :], other=0.0)
            else:
                mask_k = offs_k < K - start
                x_tile = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
                w_tile = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
            acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
            x_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * stride_wk

    out_ptrs = out_ptr + rows[:, None] * stride_om + offs_n[None, :]
    mask = (rows < M)[:, None] & mask_n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "threshold", "seed"])
def lora_matmul_kernel(
    x, w, s_ptr, b_ptr, bias_ptr, out_ptr, M, N, K, scale, keep_scale, threshold, seed,
    stride_xm, stride_wk, stride_wn, stride_sm, stride_br, stride_bn, stride_om,
    RANK: tl.constexpr, DROPOUT: tl.constexpr, GROUPED: tl.constexpr, EVEN_K: tl.constexpr,
    TMA: tl.constexpr, ALONG_K: tl.constexpr, PERSISTENT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """x, w: pointers, or descriptors with TMA: x [M, K] and w [N, K] (ALONG_K) or [K, N]."""
    if PERSISTENT:
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            output_tile(
                tile, x, w, s_ptr, b_ptr, bias_ptr, out_ptr, M, N, K, scale, keep_scale, threshold,
                seed, stride_xm, stride_wk, stride_wn, stride_sm, stride_br, stride_bn, stride_om,
                RANK, DROPOUT, GROUPED, EVEN_K, TMA, ALONG_K, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
                GROUP_M,
            )  # fmt: skip
    else:
        output_tile(
            tl.program_id(0), x, w, s_ptr, b_ptr, bias_ptr, out_ptr, M, N, K, scale, keep_scale,
            threshold, seed, stride_xm, stride_wk, stride_wn, stride_sm, stride_br, stride_bn,
            stride_om, RANK, DROPOUT, GROUPED, EVEN_K, TMA, ALONG_K, BLOCK_M, BLOCK_N, BLOCK_K,
            BLOCK_R, GROUP_M,
        )  # fmt: skip


def config_for(dtype: torch.dtype, major: int) -> configs.LoraMatmul:
    """Where a dtype starts from on GPUs of this compute capability: fp32 is multiplied in full
    precision, which matrix units do not have.
    """
    if dtype == torch.float32:
        return configs.LORA_MATMUL_NO_MATRIX_UNITS
    return configs.LORA_MATMUL_BY_MAJOR.get(major, configs.LORA_MATMUL)


def default_config(x: Tensor) -> configs.LoraMatmul:
    """``config_for`` x's dtype and GPU; AMD's capability is not a version of NVIDIA's."""
    nvidia = x.is_cuda and not torch.version.hip
    major = torch.cuda.get_device_capability(x.device)[0] if nvidia else 0
    return config_for(x.dtype, major)


def lora_matmul(
    x: Tensor,
    w: Tensor,
    s: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None,
    out: Tensor,
    p_threshold: int = 0,
    keep_scale: float = 1.0,
    seed: int = 0,
    config: configs.LoraMatmul | None = None,
) -> None:
    """x [M, K], w [K, N], s [M, R], b [R, N], bias [N] -> out [M, N], all of one dtype; R >= 1.

    x, s and out have adjacent columns and any row stride; w and b any two strides of which one is
    1. An element (m, n) of s b is zero where word m N + n of the seed is below p_threshold, else
    multiplied by keep_scale.
    """
    (m, k), n, rank = x.shape, w.shape[1], s.shape[1]
    if m * n == 0:
        return
    config = config or default_config(x)
    along_k = w.stride(0) == 1
    stored = w.t() if along_k else w
    if config.tma and not (k > 0 and _fits_tma(x) and _fits_tma(stored)):
        config = replace(configs.LORA_MATMUL, persistent=config.persistent)
    block_m = max(16, min(config.block_m, triton.next_power_of_2(m)))
    block_r = max(16, min(config.block_r, triton.next_power_of_2(rank)))
    x_in: Any = x
    w_in: Any = w
    if config.tma:
        blocks = (config.block_n, config.block_k) if along_k else (config.block_k, config.block_n)
        x_in = TensorDescriptor.from_tensor(x, [block_m, config.block_k])
        w_in = TensorDescriptor.from_tensor(stored, list(blocks))
    tiles = triton.cdiv(m, block_m) * triton.cdiv(n, config.block_n)
    grid = min(tiles, _multiprocessors(x.device)) if config.persistent else tiles
    lora_matmul_kernel[(grid,)](
        x_in, w_in, s, b, bias, out, m, n, k, scale, keep_scale, p_threshold, seed,
        x.stride(0), *w.stride(), s.stride(0), *b.stride(), out.stride(0),
        RANK=rank, DROPOUT=p_threshold > 0, GROUPED=n % 4 == 0, EVEN_K=k % config.block_k == 0,
        TMA=config.tma, ALONG_K=along_k, PERSISTENT=config.persistent, BLOCK_M=block_m,
        BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_R=block_r, GROUP_M=config.group_m,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _fits_tma(x: Tensor) -> bool:
    """Whether a descriptor can describe x [ROWS, COLS]."""
    pitch = x.stride(0) * x.element_size()
    aligned = x.data_ptr() % TMA_ALIGN == 0 and pitch % TMA_ALIGN == 0
    return aligned and pitch > 0 and x.stride(1) == 1


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
