"""y = x Wᵀ + bias for few rows of x over a quantized weight, which is decoded tile by tile, rounded
once to x's dtype and never stored.

A program gives BLOCK_M x BLOCK_N of y and goes through all of K alone, so that two runs give the
same bits. Bytes moved: 0.5 per weight with 4 bits, and its share of a scale, for up to 64 rows of
x; decoding to memory first moves 2.5 and lets the matmul read 2 again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyft.kernels import configs
from pyft.kernels.tiles import NESTED_BLOCK, is_flat, load_code, load_scale, load_zero, unpack4


@triton.jit(do_not_specialize=["M", "N", "K"])
def qlinear_kernel(
    x_ptr, packed_ptr, scales_ptr, zeros_ptr, nested_ptr, offset_ptr, codes_ptr, scale_codes_ptr,
    bias_ptr, y_ptr, M, N, K, stride_xm, stride_ym,
    BITS: tl.constexpr, BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x [M, K], W [N, K] -> y [M, N]. With BLOCK 0 a row of W is one block. K is a multiple of
    GROUP, whose elements lie in one block.
    """
    tl.static_assert(BLOCK_K % GROUP == 0)
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(
            x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :],
            mask=mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_K]
        mask_w = mask_n[:, None] & mask_k[None, :]
        if BITS == 4 and GROUP > 1:
            offs_b = start // 2 + tl.arange(0, BLOCK_K // 2)
            byte = tl.load(
                packed_ptr + offs_n[:, None] * (K // 2) + offs_b[None, :],
                mask=mask_n[:, None] & (offs_b * 2 < K)[None, :],
                other=0,
            )  # [BLOCK_N, BLOCK_K // 2]
            code = unpack4(byte)
        else:
            code = load_code(packed_ptr, offs_n[:, None] * K + offs_k[None, :], mask_w, BITS)
        offs_g = start // GROUP + tl.arange(0, GROUPS)
        mask_g = mask_n[:, None] & (offs_g * GROUP < K)[None, :]
        if BLOCK == 0:
            block = offs_n[:, None] + tl.zeros_like(offs_g)[None, :]
        else:
            block = (offs_n[:, None] * (K // GROUP) + offs_g[None, :]) * GROUP // BLOCK
        scale = load_scale(
            scales_ptr, nested_ptr, offset_ptr, scale_codes_ptr, block, mask_g, NESTED_BLOCK
        )  # [BLOCK_N, GROUPS]
        zero = load_zero(zeros_ptr, block, mask_g)
        value = tl.load(codes_ptr + code).reshape(BLOCK_N, GROUPS, GROUP)
        w = ((value - zero[:, :, None]) * scale[:, :, None]).reshape(BLOCK_N, BLOCK_K)
        w = tl.where(mask_w, w, 0.0).to(x.dtype)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def default_config(x: Tensor) -> configs.QLinear:
    """What x's dtype and GPU start from: fp32 and sm_75 multiply without matrix units."""
    old = (
        x.is_cuda and not torch.version.hip and torch.cuda.get_device_capability(x.device) < (8, 0)
    )
    if old or x.dtype == torch.float32:
        return configs.QLINEAR_NO_MATRIX_UNITS
    return configs.QLINEAR


def qlinear(
    x: Tensor,
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
    bias: Tensor | None,
    out: Tensor,
    config: configs.QLinear | None = None,
) -> None:
    """x [M, K] and a weight of ``shape`` [N, K] -> out [M, N]; adjacent columns, any row stride."""
    m, (n, k) = x.shape[0], shape
    if m * n == 0:
        return
    config = config or default_config(x)
    flat = is_flat(block_size)
    block_m = max(16, min(config.block_m, triton.next_power_of_2(m)))
    group = min(config.block_k, 32, k & -k) if k else 1  # block sizes are multiples of 32
    qlinear_kernel[(triton.cdiv(m, block_m), triton.cdiv(n, config.block_n))](
        x, packed, scales, zeros, nested, offset, codes, scale_codes, bias, out,
        m, n, k, x.stride(0), out.stride(0),
        BITS=bits, BLOCK=block_size if flat else 0, NESTED_BLOCK=NESTED_BLOCK, GROUP=group,
        BLOCK_M=block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
